"""A text opened whole, for evaluation: every byte once, between ends of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm_gpu.data import open_text
from cllm_gpu.data.tokenizers import ByteTokenizer, load_tokenizer
from cllm_gpu.utils.errors import UserError


def test_documents_between_ends_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "zwölf"}\n')
    source = open_text(str(tmp_path / "a.jsonl"), ByteTokenizer())
    tokens = source.read(0, len(source)).tolist()
    assert tokens == [256, *b"one", 256, *"zwölf".encode(), 256]
    assert source.text_bytes == 9


def test_with_merges(tmp_path: Path, bpe_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 100)
    source = open_text(str(tmp_path / "a.txt"), load_tokenizer(str(bpe_path)))
    assert len(source) < 2400 / 2
    assert source.text_bytes == 2400


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"a.jsonl holds no text to evaluate"):
        open_text(str(tmp_path / "a.jsonl"), ByteTokenizer())
