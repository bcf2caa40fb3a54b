"""Small models and tokenizers of several kinds, as they lie in runs of ours and in Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from cllm_gpu.huggingface import export_model
from cllm_gpu.model.architecture import Architecture

SHAPE = Architecture(vocabulary=257, context=16, layers=2, heads=2, kv_heads=2, width=16, mlp_width=64)
BuildModel = Callable[..., Any]


@pytest.fixture(scope="session")
def bpe() -> HuggingFaceTokenizer:
    """A byte-level BPE with a few merges and <|endoftext|>."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(["The number 7 squared is 49.\nThe cat sat.\n"] * 20, trainer)
    return HuggingFaceTokenizer(made.to_str(), "made here")


@pytest.fixture
def exported(build_model: BuildModel, tmp_path: Path) -> Path:
    """A small model of bytes as a Hugging Face folder."""
    model, _ = build_model(SHAPE, np.float32)
    export_model(model, ByteTokenizer(), tmp_path / "exported")
    return tmp_path / "exported"


@pytest.fixture
def change_config() -> Callable[..., None]:
    """change_config(folder, name=value, …): other settings in its config.json."""

    def change(folder: Path, **settings: Any) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: HuggingFaceTokenizer) -> Tokenizer:
    """The tokenizers that have a Hugging Face form."""
    return bpe if request.param == "bpe" else ByteTokenizer()
