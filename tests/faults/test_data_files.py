"""Data that changes under a training run, and files that are not what they seem: one line each, nothing lost."""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import Config, from_dict
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.data.sources import find_corpus
from cllm_gpu.data.text import TextOptions
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError

pytestmark = pytest.mark.slow

CONTEXT = 8


def opened(source: Path, cache: Path, **changes: Any) -> Dataset:
    settings = {"tokenizer": "bytes", "validation_fraction": 0.1, "seed": 1, "cache_folder": cache, "context": CONTEXT}
    return open_dataset(str(source), **(settings | changes))


def small(steps: int) -> Config:
    return from_dict(
        {
            "model": {"size": "custom", "layers": 1, "heads": 1, "width": 8, "context": CONTEXT},
            "training": {"steps": steps, "batch": 2, "evaluate_every": 0, "evaluation_batches": 2, "workers": 1},
            "schedule": {"warmup_steps": 0},
        }
    )


def shrink(path: Path) -> None:
    os.truncate(path, 600)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(700)
        file.write(b"\xff" * 400)


DAMAGE: dict[str, Callable[[Path], None]] = {"shrunk": shrink, "grown": grow, "overwritten": overwrite}
HEADER = np.array([20240520, 1, 3000] + [0] * 253, dtype="<i4").tobytes()


def make(kind: str, folder: Path) -> tuple[Path, Path]:
    """A source of tokens of a kind, and its file with the training tokens."""
    if kind == "llm.c":
        ids = np.random.default_rng(1).integers(0, 257, 3000).astype("<u2")
        (folder / "train_0.bin").write_bytes(HEADER + ids.tobytes())
        (folder / "x_val_0.bin").write_bytes(HEADER + ids.tobytes())
        return folder, folder / "train_0.bin"
    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(300)))
    opened(folder / "text.txt", folder / "cache")
    return folder / "text.txt", next((folder / "cache").glob("tokens-*/train.tokens"))


@pytest.mark.parametrize("kind", ["own shards", "llm.c"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_data_that_changes_while_training(kind: str, damage: str, tmp_path: Path) -> None:
    """The run ends in one line, with a checkpoint of the last step whose data was sound."""
    tried, short = 0, []
    for at in (1, 2, 5, 9, 14):
        folder = tmp_path / str(at)
        folder.mkdir()
        source, file = make(kind, folder)
        changes = {"tokenizer": "bytes"}
        trainer = Trainer(small(20), get_backend("numpy", workers=1), opened(source, folder / "cache", **changes),
                          folder=folder / "run")  # fmt: skip
        trainer.initialise()

        def step(record: dict[str, Any], at: int = at, file: Path = file) -> None:
            if record["step"] == at:
                DAMAGE[damage](file)

        trainer.reporter.step = step  # type: ignore[method-assign]
        tried += 1
        try:
            trainer.train()
            short.append((at, "it went on"))
        except UserError as error:
            saved = load_checkpoint(folder / "run").step
            if saved != at or "changed while it was in use" not in str(error) or "\n" in str(error):
                short.append((at, f"{saved}: {error}"))
        finally:
            trainer.close()
    print(f"{kind} {damage} while training: {tried} tried, {len(short)} fell short")
    assert not short


def test_a_shard_that_is_only_touched_goes_on(tmp_path: Path) -> None:
    source, file = make("own shards", tmp_path)
    train = opened(source, tmp_path / "cache").train
    before = train.read(0, 50).tolist()
    for _ in range(5):
        os.utime(file)
        assert train.read(0, 50).tolist() == before


# ---- files of records, compressed or not

TEXTS = [f'{n} times {n} is {n * n}, "quoted", ligne é 語 😀\nsecond line {n}' for n in range(400)]


def as_json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def as_json(texts: list[str]) -> bytes:
    return json.dumps([{"text": text, "n": [n, {"a": None}]} for n, text in enumerate(texts)], indent=1).encode()


def as_csv(texts: list[str]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerows([["n", "text"], *([n, text] for n, text in enumerate(texts))])
    return out.getvalue().encode()


def as_text(texts: list[str]) -> bytes:
    return "\n<|endoftext|>\n".join(texts).encode()


FORMS: dict[str, Callable[[list[str]], bytes]] = {
    "a.jsonl": as_json_lines, "a.json": as_json, "b.json": as_json_lines, "a.csv": as_csv, "a.txt": as_text,
}  # fmt: skip


def zstd(data: bytes) -> bytes:
    return importlib.import_module("zstandard").ZstdCompressor().compress(data)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


CHECKED = (".gz", ".bz2", ".xz")
"""Forms that hold a checksum of their content always."""


def packed(data: bytes, suffix: str, frames: int) -> bytes:
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    size = -(-len(data) // frames)
    return b"".join(PACKERS[suffix](data[i : i + size]) for i in range(0, len(data), size))


def documents(path: Path, **options: Any) -> list[str]:
    found, current = [], ""
    reached = 0
    corpus = find_corpus(str(path), TextOptions(**options))
    for piece in corpus.pieces():
        assert reached <= piece.start <= piece.end <= corpus.total_bytes
        current, reached = current + piece.text, piece.start
        if piece.last:
            found.append(current)
            current = ""
    assert current == ""
    return found


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("frames", [1, 7])
def test_records_come_through_whole(name: str, suffix: str, frames: int, tmp_path: Path) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(packed(FORMS[name](TEXTS), suffix, frames))
    assert documents(path, separator="<|endoftext|>") == TEXTS


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", PACKERS)
def test_what_is_cut_off_or_flipped_is_one_line_or_all_there(name: str, suffix: str, tmp_path: Path) -> None:
    """A compressed file, or an array, that ends too early is never a shorter text; damage is told of by checksums."""
    generator, path = random.Random(13), tmp_path / (name + suffix)
    whole = packed(FORMS[name](TEXTS), suffix, 1)
    refused_when_cut = bool(suffix) or name == "a.json"
    tried, short = 0, []
    for n in range(150):
        at, cut = generator.randrange(9, len(whole)), n % 2 == 0
        flipped = bytearray(whole)
        flipped[at] ^= 1 << generator.randrange(8)
        path.write_bytes(whole[:at] if cut else bytes(flipped))
        tried += 1
        try:
            found = documents(path, separator="<|endoftext|>")
            if (cut and refused_when_cut) or (not cut and found != TEXTS and suffix in CHECKED):
                short.append((at, len(found)))
        except UserError as error:
            if "\n" in str(error):
                short.append((at, error))
    print(f"{name}{suffix} cut or flipped: {tried} tried, {len(short)} fell short")
    assert not short, short[:3]


TAR_GZ = gzip.compress(bytes(257) + b"ustar" + bytes(99), mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.parquet", b"PAR1" + bytes(90), r"is Parquet: pip install pyarrow|cannot be read by pyarrow"),
        ("a.txt", b"PK\x03\x04" + bytes(90), "is no text but a zip file .*: unpack it first"),
        ("a.txt", "héllo".encode("utf-16"), "is no text but UTF-16: convert it to UTF-8"),
        ("a.txt", b"abc\0def", "is no text but binary data: give UTF-8 text"),
        ("a.txt.gz", TAR_GZ, "is no text but a tar archive: unpack it first"),
        ("a.gz", b"plain text", "is no gzip file, though its name says so"),
        ("a.json", b'{"text": "a"} x', "not JSON"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "is cut off: its array does not end"),
        ("a.json", b'[{"text": "a"}] 7', "something follows its array"),
        ("a.json", b"[" * 100000, "not JSON"),
        ("a.json", b'{"text": ' + b"7" * 5000 + b"}", "not JSON that can be read"),
        ("a.json", b'{"content": "a"}', r'no text in the field "text" \(fields: content\); --data.text-field names'),
        ("a.csv", b"a,b\n1,2\n", r'no text in the field "text" \(fields: a, b\); --data.text-field names another'),
        ("a.csv", b'text\n"open', "not CSV"),
        ("a.csv", b"text,n\na,1\nb\n", "a.csv:3: 1 columns, the first row has 2"),
        ("a.csv", b"text\n\xff\n", "is not UTF-8 text"),
        ("a.bin", bytes(4000), "for bare token ids, as nanoGPT writes them, say --data.dtype uint16"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_advice(name: str, content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as raised:
        opened(tmp_path / name, tmp_path / "cache")
    assert "\n" not in str(raised.value)


def test_a_folder_skips_and_counts_what_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(as_json_lines(["two", "three"])))
    (folder / "c.png").write_bytes(b"\x89PNG\0")
    corpus = find_corpus(str(folder))
    for _ in range(2):
        assert [piece.text for piece in corpus.pieces()] == ["one", "two", "three"]
        assert corpus.skipped == 3


def test_a_field_by_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,n\nhello,1\n")
    assert documents(tmp_path / "a.csv", field="body") == ["hello"]


def test_validation_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 20)
    (tmp_path / "b.txt").write_text("xyz " * 10)
    dataset = opened(tmp_path / "a.txt", tmp_path / "cache", validation=str(tmp_path / "b.txt"))
    assert bytes(dataset.train.read(0, 80).astype(np.uint8)).decode() == "abc " * 20
    assert bytes(dataset.validation.read(0, 40).astype(np.uint8)).decode() == "xyz " * 10
    with pytest.raises(UserError, match=r"data.validation is 'x', but patterns has its own validation part"):
        opened(Path("patterns"), tmp_path / "cache", tokenizer="patterns", validation="x")


def test_an_end_of_text_written_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(as_text(TEXTS))
    notes = opened(tmp_path / "a.txt", tmp_path / "cache").notes
    assert notes[0].startswith("<|endoftext|> stands in a sample of the text ")
    assert notes[0].endswith("documents end there with --data.separator '<|endoftext|>'")
    split = opened(tmp_path / "a.txt", tmp_path / "cache", options=TextOptions(separator="<|endoftext|>"))
    assert split.notes == ()
    assert (split.train.documents or 0) + (split.validation.documents or 0) == len(TEXTS)


def test_bare_token_ids(tmp_path: Path) -> None:
    for name, first in (("train.bin", 0), ("val.bin", 500)):
        (tmp_path / name).write_bytes(np.arange(first, first + 300, dtype="<u2").tobytes())
    dataset = opened(tmp_path, tmp_path / "cache", dtype="uint16")
    assert dataset.train.read(0, 3).tolist() == [0, 1, 2]
    assert dataset.validation.read(0, 3).tolist() == [500, 501, 502]
    apart = opened(tmp_path / "val.bin", tmp_path / "cache", dtype="uint16", validation=str(tmp_path / "train.bin"))
    assert (apart.train.read(0, 1)[0], apart.validation.read(0, 1)[0]) == (500, 0)
    (tmp_path / "val.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match="has 3 bytes, which are no whole number of uint16"):
        opened(tmp_path, tmp_path / "cache", dtype="uint16")


def test_a_test_shard_is_no_training_data(tmp_path: Path) -> None:
    for name, first in (("x_train.bin", 1), ("x_valid.bin", 2), ("x_test.bin", 3)):
        (tmp_path / name).write_bytes(HEADER + np.full(3000, first, dtype="<u2").tobytes())
    dataset = opened(tmp_path, tmp_path / "cache")
    assert set(dataset.train.read(0, 3000).tolist()) == {1}
    assert set(dataset.validation.read(0, 3000).tolist()) == {2}
    assert (len(dataset.train), len(dataset.validation)) == (3000, 3000)


def test_a_text_replaced_with_same_size_and_time_is_noticed(tmp_path: Path) -> None:
    path, tried, short = tmp_path / "a.txt", 0, 0
    for size in (40, 5000, 200_000):
        found = set()
        for letter in "abc":
            path.write_text(letter * size)
            os.utime(path, ns=(10**18, 10**18))
            found.add(find_corpus(str(path)).identity)
            tried += 1
        short += len(found) != 3
    print(f"replaced texts: {tried} tried, {short} fell short")
    assert not short


def test_parquet_by_pyarrow(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": list(range(400)), "text": TEXTS}), path, row_group_size=50)
    assert documents(path) == TEXTS
    with pytest.raises(UserError, match=r'no text in the field "body" \(fields: n, text\)'):
        documents(path, field="body")
    with pytest.raises(UserError, match=r'row 1: no text in the field "n"'):
        documents(path, field="n")
    generator, whole = random.Random(13), path.read_bytes()
    tried, short = 0, []
    for _ in range(60):
        at = generator.randrange(9, len(whole))
        path.write_bytes(whole[:at])
        tried += 1
        try:
            documents(path)
            short.append((at, "read"))
        except UserError as error:
            if "\n" in str(error):
                short.append((at, str(error)))
    print(f"Parquet cut off: {tried} tried, {len(short)} fell short")
    assert not short
