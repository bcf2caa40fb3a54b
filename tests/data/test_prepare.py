"""Preparing and opening: caching, races, progress, and everything that can be wrong with a prepared folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.data import Batches, open_dataset, prepare, shards
from cllm_gpu.data.sources import Corpus, find_corpus
from cllm_gpu.data.tokenizers import load_tokenizer
from cllm_gpu.utils.errors import UserError


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("It was so: the cat sat on the mat.\n\n" * 500)
    return path


def only_folder(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_the_standard_library_end_to_end(open_source) -> None:
    dataset = open_source("stdlib", context=256, validation_fraction=0.05)
    assert len(dataset.train) > 5_000_000
    assert 0.02 < len(dataset.validation) / len(dataset.train) < 0.12
    assert 0.99 < dataset.bytes_per_token < 1
    tokens, _ = Batches(dataset.train, batch=8, context=256, seed=1).batch(0)
    decoded = dataset.tokenizer.decode(tokens.ravel())
    assert sum(word in decoded for word in ("self", "def ", "return", "import", "if ")) >= 3


def test_prepared_once_and_found_again(open_source, tmp_path: Path, book: Path, monkeypatch) -> None:
    first = open_source(book)
    monkeypatch.setattr(Corpus, "pieces", None)  # preparing again would fail
    second = open_source(book)
    assert np.array_equal(first.train.read(0, len(first.train)), second.train.read(0, len(second.train)))
    assert first.bytes_per_token == second.bytes_per_token
    only_folder(tmp_path / "cache")


def test_prepared_again_when_anything_changes(open_source, tmp_path: Path, book: Path, bpe_path: Path) -> None:
    open_source(book)
    open_source(book, seed=2)
    open_source(book, validation_fraction=0.2)
    open_source(book, tokenizer=str(bpe_path))
    assert len(list((tmp_path / "cache").iterdir())) == 4
    book.write_text("Another text of another length.\n" * 100)
    changed = open_source(book)
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert changed.tokenizer.decode(changed.train.read(0, 12)) == "Another text"


def test_a_bpe_corpus(open_source, book: Path, bpe_path: Path) -> None:
    dataset = open_source(book, tokenizer=str(bpe_path))
    text = dataset.tokenizer.decode(dataset.train.read(0, len(dataset.train)))
    text += dataset.tokenizer.decode(dataset.validation.read(0, len(dataset.validation)))
    assert text == book.read_text()
    assert dataset.bytes_per_token == dataset.validation.text_bytes / len(dataset.validation)
    assert dataset.bytes_per_token > 1.05


def test_a_prepared_folder_or_shard_is_a_source(open_source, tmp_path: Path, book: Path, bpe_path: Path) -> None:
    prepared = open_source(book)
    folder = tmp_path / "moved"
    shutil.copytree(only_folder(tmp_path / "cache"), folder)
    for source in (folder, folder / "train.tokens"):
        again = open_source(source)
        assert np.array_equal(again.train.read(0, 100), prepared.train.read(0, 100))
        assert len(again.validation) == len(prepared.validation)
    with pytest.raises(
        UserError,
        match=r"train.tokens was made with another tokenizer: bytes \([0-9a-f]{8}\), here it is "
        r"\S+tokenizer.json \([0-9a-f]{8}\); give that one",
    ):
        open_source(folder, tokenizer=str(bpe_path))
    (folder / "validation.tokens").unlink()
    with pytest.raises(UserError, match=r"cannot read .*validation.tokens"):
        open_source(folder)


def test_parts_of_two_sets_do_not_mix(open_source, tmp_path: Path, book: Path) -> None:
    open_source(book)
    open_source(book, seed=2)
    one, two = sorted((tmp_path / "cache").iterdir())
    shutil.copy(two / "validation.tokens", one / "validation.tokens")
    with pytest.raises(UserError, match=r"validation.tokens belongs to another set"):
        open_source(one)
    shutil.copy(one / "train.tokens", one / "validation.tokens")
    with pytest.raises(UserError, match=r"validation.tokens belongs to another set"):
        open_source(one)


def prepare_folder(source: Path, target: Path, tokenizer: str = "bytes") -> None:
    prepare.new_folder(find_corpus(str(source)), load_tokenizer(tokenizer), target, fraction=0.1, seed=1, progress=None)


def test_a_folder_made_ahead_of_time(open_source, tmp_path: Path, book: Path, bpe_path: Path) -> None:
    tokenizer = str(bpe_path)
    prepare_folder(book, tmp_path / "sets" / "book", tokenizer)
    ahead, cached = open_source(tmp_path / "sets" / "book", tokenizer=tokenizer), open_source(book, tokenizer=tokenizer)
    assert ahead.identity == cached.identity
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["book"]
    with pytest.raises(UserError, match=r"book exists already: name a new folder for the shards"):
        prepare_folder(book, tmp_path / "sets" / "book")
    (tmp_path / "bad.txt").write_bytes(b"fine text\n" * 100 + b"\xff")
    with pytest.raises(UserError, match="at byte 1000"):
        prepare_folder(tmp_path / "bad.txt", tmp_path / "sets" / "bad")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["book"]


def test_documents_end_with_the_end_of_text(open_source, tmp_path: Path, bpe_path: Path) -> None:
    texts = [f"text {i} says <|endoftext|> in words" for i in range(40)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = open_source(tmp_path / "lines.jsonl", tokenizer=str(bpe_path))
    found = []
    for source in (dataset.train, dataset.validation):
        tokens = source.read(0, len(source))
        ends = np.flatnonzero(tokens == dataset.tokenizer.end_of_text)
        assert ends[-1] == len(tokens) - 1
        found += [dataset.tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    assert sorted(found) == sorted(texts)


def test_a_damaged_cache_is_noticed(open_source, tmp_path: Path, book: Path) -> None:
    open_source(book)
    path = only_folder(tmp_path / "cache") / "train.tokens"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train.tokens is damaged: its tokens do not match their checksum; delete it"):
        open_source(book)


def test_skipped_files_are_counted_also_from_the_cache(open_source, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("text " * 100)
    (tmp_path / "folder" / "b.png").write_bytes(b"\0")
    assert [open_source(tmp_path / "folder").skipped_files for _ in range(2)] == [1, 1]


def test_a_deleted_shard_is_made_again(open_source, tmp_path: Path, book: Path) -> None:
    before = open_source(book).train.read(0, 100)
    (only_folder(tmp_path / "cache") / "train.tokens").unlink()
    assert np.array_equal(open_source(book).train.read(0, 100), before)
    only_folder(tmp_path / "cache")


def test_progress_ends_at_the_whole(open_source, tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("twenty-four characters.\n" * 200_000)
    told: list[tuple[int, int]] = []
    open_source(path, progress=lambda done, total: told.append((done, total)))
    size = path.stat().st_size
    assert told == sorted(told)
    assert len(told) >= 4
    assert told[-1] == (size, size)
    assert {total for _, total in told} == {size}


def test_a_corpus_shorter_than_the_context(open_source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100)
    with pytest.raises(UserError, match=r"a.txt \(train\) has 91 tokens, too few for a context of 256"):
        open_source(tmp_path / "a.txt", context=256)


def test_bad_text_leaves_nothing_behind(open_source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine text\n" * 100 + b"\xff")
    with pytest.raises(UserError, match="at byte 1000"):
        open_source(tmp_path / "a.txt")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written(open_source, tmp_path: Path, book: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*cache: a file is where a folder is needed"):
        open_source(book, cache_folder=tmp_path / "file" / "cache")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot write .*cache: no permission; choose another place"):
        open_source(book)


def test_a_full_disk_when_syncing(open_source, tmp_path: Path, book: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk of .*\.tokens: .* are free; free some"):
        open_source(book)
    assert not list((tmp_path / "cache").iterdir())


def test_remains_of_killed_runs_are_removed(open_source, tmp_path: Path, book: Path) -> None:
    old, young = (tmp_path / "cache" / f"tokens-{name}.partial" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    open_source(book)
    assert young.exists()
    assert not old.exists()


def test_losing_the_race_uses_the_winners_folder(open_source, tmp_path: Path, book: Path, monkeypatch) -> None:
    real_rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        shutil.copytree(source, target)  # the other process is done a moment earlier
        real_rename(source, target)

    monkeypatch.setattr(prepare.os, "rename", overtaken)
    dataset = open_source(book)
    assert dataset.tokenizer.decode(dataset.train.read(0, 6)) == "It was"
    only_folder(tmp_path / "cache")


def prepare_in_process(book: Path, cache: Path, start: float) -> int:
    time.sleep(max(0.0, start - time.time()))
    dataset = open_dataset(str(book), tokenizer="bytes", validation_fraction=0.1, seed=1, cache_folder=cache, context=8)
    return int(dataset.train.read(0, 1000).sum()) * len(dataset.train)


def test_two_processes_at_once(tmp_path: Path, book: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = time.time() + 1.5
    with context.Pool(2) as pool:
        sums = pool.starmap(prepare_in_process, [(book, tmp_path / "cache", start)] * 2)
    assert sums[0] == sums[1]
    only_folder(tmp_path / "cache")
