"""Token shards: round trips, and no truncation or changed byte goes unseen."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data import shards
from cllm_gpu.data.shards import HEADER_BYTES, ShardHeader, ShardWriter, open_shard
from cllm_gpu.utils.errors import UserError


def header(vocabulary: int = 300, end_of_text: int = 299) -> ShardHeader:
    return ShardHeader(
        part=0,
        vocabulary=vocabulary,
        end_of_text=end_of_text,
        fingerprint=hashlib.sha256(b"tokenizer").digest(),
        identity=hashlib.sha256(b"corpus").digest(),
    )


def write(path: Path, documents: list[list[int]], vocabulary: int = 300) -> ShardHeader:
    written = header(vocabulary, vocabulary - 1)
    with ShardWriter(path, written) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.uint32), len(document))
            writer.end_document()
    return written


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.sampled_from([300, 65536, 65537, 1 << 20]),
    documents=st.lists(st.lists(st.integers(0, 298), max_size=40), max_size=12),
    block=st.sampled_from([4, 12, 4096]),
)
def test_round_trip(tmp_path_factory, vocabulary: int, documents: list[list[int]], block: int) -> None:
    path = tmp_path_factory.mktemp("shard") / "s.tokens"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_BYTES", block)
        written = write(path, documents, vocabulary)
        read, tokens = open_shard(path)
    wanted = [token for document in documents if document for token in [*document, vocabulary - 1]]
    assert np.asarray(tokens).tolist() == wanted
    assert tokens.dtype == (np.uint16 if vocabulary <= 65536 else np.uint32)
    assert read == written
    assert read.documents == sum(1 for document in documents if document)
    assert read.text_bytes == sum(map(len, documents))


def test_the_layout_is_little_endian_and_documented(tmp_path: Path) -> None:
    write(tmp_path / "s.tokens", [[1, 258]])
    data = (tmp_path / "s.tokens").read_bytes()
    assert data[:8] == b"CLLMTOKS"
    assert np.frombuffer(data, "<u4", 4, 8).tolist() == [1, 512, 2, 0]
    assert np.frombuffer(data, "<u8", 6, 24).tolist() == [300, 299, 3, 1, 2, 0]
    assert data[72:104] == hashlib.sha256(b"tokenizer").digest()
    assert data[104:136] == hashlib.sha256(b"corpus").digest()
    tokens = np.array([1, 258, 299], "<u2").tobytes()
    assert data[136:168] == hashlib.sha256(hashlib.sha256(tokens).digest()).digest()
    assert data[480:512] == hashlib.sha256(data[:480]).digest()
    assert data[512:] == tokens


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.tokens"
    write(path, [list(range(50)), [7] * 20])
    sound = path.read_bytes()
    for place in range(len(sound)):
        changed = bytearray(sound)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"s.tokens (is damaged|is not a token shard|has format version)"):
            open_shard(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.tokens"
    write(path, [list(range(50))])
    sound = path.read_bytes()
    for length in range(len(sound)):
        path.write_bytes(sound[:length])
        with pytest.raises(UserError, match=r"s.tokens is (truncated|not a token shard)"):
            open_shard(path)
    path.write_bytes(sound + b"\0")
    with pytest.raises(UserError, match="too long: 615 bytes instead of 614"):
        open_shard(path)


@pytest.mark.parametrize("cores", [1, 3, 64])
def test_a_changed_byte_in_any_block_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr(shards.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    path = tmp_path / "s.tokens"
    write(path, [list(range(299))])
    assert open_shard(path)[0].tokens == 300
    sound = path.read_bytes()
    for place in range(HEADER_BYTES, len(sound), 50):
        changed = bytearray(sound)
        changed[place] ^= 255
        path.write_bytes(changed)
        with pytest.raises(UserError, match="its tokens do not match their checksum"):
            open_shard(path)


def test_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "s.tokens"
    write(path, [[1]])
    data = bytearray(path.read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="format version 2, newer than this program's 1: update cllm-gpu"):
        open_shard(path)


def test_a_file_that_is_no_shard_or_is_missing(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(UserError, match="is not a token shard"):
        open_shard(tmp_path / "x")
    with pytest.raises(UserError, match="cannot read"):
        open_shard(tmp_path / "missing")


def test_an_interrupted_write_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "s.tokens"
    with pytest.raises(TypeError), ShardWriter(path, header()) as writer:
        writer.add(None, 100)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is not a token shard"):
        open_shard(path)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk fills up at the header's place, at a block, and at the last block."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    real_open = Path.open

    def full_open(path: Path, mode: str = "r", *rest: object) -> object:
        file = real_open(path, mode, *rest)
        return FullDisk(file, after) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", full_open)
    path = tmp_path / "s.tokens"
    with (
        pytest.raises(
            UserError, match=r"no space left on the disk of .*s.tokens: .* free some or choose another folder"
        ),
        ShardWriter(path, header()) as writer,
    ):
        writer.add(np.arange(50, dtype=np.uint32), 50)


class FullDisk:
    """A file that takes `writes` writes and then has no space left."""

    def __init__(self, file: object, writes: int) -> None:
        self._file, self._writes = file, writes

    def write(self, data: bytes) -> int:
        if self._writes == 0:
            self._file.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        self._writes -= 1
        return self._file.write(data)

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("bytes", "bytes"),
        ("é" * 48, "é" * 48),
        ("/a/long/place/" * 9 + "tokenizer.json", "…" + ("/a/long/place/" * 9 + "tokenizer.json")[-93:]),
        ("€" * 33, "…" + "€" * 31),
        ("a\udcff.json", "a?.json"),
        ("", ""),
    ],
)
def test_the_tokenizers_name_travels(tmp_path: Path, name: str, found: str) -> None:
    written = header()
    written.tokenizer = name
    with ShardWriter(tmp_path / "s.tokens", written) as writer:
        writer.add(np.array([1], dtype=np.uint32), 1)
    assert open_shard(tmp_path / "s.tokens")[0].tokenizer == found
