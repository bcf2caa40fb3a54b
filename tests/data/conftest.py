"""Helpers shared by the data tests: opening a source in a cache of the test's own, and a small byte-level BPE."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.data import Dataset, open_dataset


@pytest.fixture
def open_source(tmp_path: Path) -> Callable[..., Dataset]:
    """`open_dataset` with a cache in the test's folder and small defaults."""

    def opened(source: str | Path, **changes: Any) -> Dataset:
        settings: dict[str, Any] = {
            "tokenizer": "bytes",
            "validation_fraction": 0.1,
            "seed": 1,
            "cache_folder": tmp_path / "cache",
            "context": 4,
        }
        return open_dataset(str(source), **(settings | changes))

    return opened


@pytest.fixture(scope="session")
def bpe_json() -> str:
    """A byte-level BPE tokenizer.json of 276 ids (its text has no more merges), with <|endoftext|> special."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat,\n\n  the dog on the log.\n"] * 50, trainer)
    return tokenizer.to_str()


@pytest.fixture
def bpe_path(bpe_json: str, tmp_path: Path) -> Path:
    """The same in a file."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(bpe_json)), encoding="utf-8")
    return path
