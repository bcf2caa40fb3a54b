"""llm.c's .bin shards, made here byte by byte as its documentation says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.data import Batches
from cllm_gpu.utils.errors import UserError


def write(path: Path, tokens: list[int] | np.ndarray, magic: int = 20240520, version: int = 1, count: int = -1) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count < 0 else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2" if magic == 20240520 else "<u4").tobytes())
    return path


def test_names_say_which_part(open_source, tmp_path: Path) -> None:
    write(tmp_path / "fineweb_train_000002.bin", range(300, 400))
    write(tmp_path / "fineweb_train_000001.bin", range(100, 300))
    write(tmp_path / "fineweb_val_000000.bin", range(50))
    for source in (tmp_path, tmp_path / "fineweb_*.bin"):
        dataset = open_source(source)
        assert dataset.train.read(0, 300).tolist() == list(range(100, 400))
        assert dataset.validation.read(0, 50).tolist() == list(range(50))
        assert (dataset.tokenizer, dataset.bytes_per_token, dataset.vocabulary) == (None, None, 50257)


def test_one_file_is_split_by_position(open_source, tmp_path: Path) -> None:
    dataset = open_source(write(tmp_path / "tiny_shakespeare_train.bin", range(1000)))
    assert dataset.train.read(0, 900).tolist() == list(range(900))
    assert dataset.validation.read(0, 100).tolist() == list(range(900, 1000))
    assert len(dataset.train) == 900


def test_llama_3_shards_are_uint32(open_source, tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [128000, 7, 70000] * 20, magic=20240801, version=7)
    dataset = open_source(path)
    assert dataset.train.read(0, 3).tolist() == [128000, 7, 70000]
    assert dataset.vocabulary == 128256
    assert Batches(dataset.train, batch=2, context=8, seed=0).batch(0)[0].dtype == np.int32


def test_a_tokenizer_given_for_them_decodes_and_bounds(open_source, tmp_path: Path, bpe_path: Path) -> None:
    dataset = open_source(write(tmp_path / "a.bin", [5, 6, 7] * 20), tokenizer=str(bpe_path))
    assert dataset.vocabulary == 276
    assert len(dataset.tokenizer.decode(dataset.train.read(0, 3))) == 3
    dataset = open_source(write(tmp_path / "b.bin", [5, 6, 276] * 20), tokenizer=str(bpe_path))
    with pytest.raises(
        UserError, match=r"b.bin \(train\) holds token id 276 \(token 2\), outside the vocabulary of 276"
    ):
        dataset.train.read(0, 3)


@pytest.mark.parametrize("change", [-1, 1, -1025])
def test_a_wrong_size(open_source, tmp_path: Path, change: int) -> None:
    path = write(tmp_path / "a.bin", range(100))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(UserError, match=r"a.bin (says it holds 100 tokens, which are 1224 bytes|is truncated)"):
        open_source(path)


def test_bad_headers(open_source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version 2; llm.c shards of GPT-2 have version 1"):
        open_source(write(tmp_path / "a.bin", range(100), version=2))
    with pytest.raises(UserError, match=r"is not an llm.c shard: its magic number is 5, not 20240520 or 20240801"):
        open_source(write(tmp_path / "a.bin", range(100), magic=5))
    with pytest.raises(UserError, match="says it holds 0 tokens"):
        open_source(write(tmp_path / "a.bin", []))
    write(tmp_path / "a.bin", range(100))
    write(tmp_path / "b.bin", range(100), magic=20240801, version=7)
    with pytest.raises(UserError, match="mixes shards of GPT-2 and Llama 3"):
        open_source(tmp_path)


def test_too_few_tokens(open_source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 90 tokens, too few for a context of 128"):
        open_source(write(tmp_path / "a.bin", range(100)), context=128)
