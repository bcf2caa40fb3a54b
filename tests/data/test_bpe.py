"""Learning a byte-level BPE: the merges are the right ones, the file is always the same, validation is never seen."""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data.bpe import EvenSubsample, Reading, learn_bpe, measure, split_long_runs
from cllm_gpu.data.sources import find_corpus
from cllm_gpu.data.split import Part, part_of_document
from cllm_gpu.data.tokenizers import HuggingFaceTokenizer
from cllm_gpu.utils.errors import UserError

TEXT = "".join(f"The number {i} squared is {i * i}, isn't it?\n\n  And its cube's {i**3}.\n" for i in range(60))
GPT2_ASCII = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"""GPT-2's splitting pattern with its Unicode classes written out for ASCII."""


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "book.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


def learnt(source: Path, vocabulary: int, limit: int = 10**9, fraction: float = 0.1) -> tuple[str, Reading]:
    reading = Reading(find_corpus(str(source)), fraction=fraction, seed=1, limit=limit)
    return learn_bpe(reading, vocabulary), reading


@pytest.fixture(scope="module")
def learnt_json(book: Path) -> str:
    return learnt(book, 300)[0]


def joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """`word` with every `pair` in it made one symbol, from the left."""
    out: list[str] = []
    index = 0
    while index < len(word):
        found = word[index : index + 2] == pair
        out.append("".join(word[index : index + 1 + found]))
        index += 1 + found
    return tuple(out)


def merges_by_hand(text: str, count: int) -> list[list[str]]:
    """The first merges, by counting all pairs anew for each; the pair of lower ids wins a tie."""
    alphabet = sorted({chr(b) for b in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
                      | {chr(0x100 + n) for n in range(68)})  # fmt: skip
    ids = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    spelled = [tuple(word.replace(" ", "Ġ").replace("\n", "Ċ")) for word in GPT2_ASCII.findall(text)]
    words = Counter(spelled)
    merges: list[list[str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        first, second = best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append([first, second])
        ids.setdefault(first + second, len(ids))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[joined(word, best)] += times
        words = merged
    return merges


def test_merges_are_those_of_the_definition(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    json_text, reading = learnt(path, 257 + 40)
    training = TEXT.encode()[: reading.training_share.taken].decode()  # one file is split by position
    assert 0.9 * len(TEXT) <= len(training) < 0.92 * len(TEXT)
    merges = json.loads(json_text)["model"]["merges"]  # pairs, or "a b" as earlier versions of the library wrote
    assert [m.split(" ") if isinstance(m, str) else m for m in merges] == merges_by_hand(training, 40)


def test_the_same_text_gives_the_same_file(book: Path, learnt_json: str) -> None:
    assert learnt(book, 300)[0] == learnt_json
    assert learnt(book, 299)[0] != learnt_json


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives(learnt_json: str, text: str) -> None:
    tokenizer = HuggingFaceTokenizer(learnt_json, "t")
    for written in (text, f"{text}<|endoftext|>{text}"):
        ids = tokenizer.encode(written).tolist()
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode_bytes([*ids, tokenizer.end_of_text]) == written.encode()


def test_it_is_a_tokenizer_json_the_library_reads(learnt_json: str) -> None:
    import tokenizers

    library = tokenizers.Tokenizer.from_str(learnt_json)
    assert library.get_vocab_size() == 300
    assert library.decode(library.encode("isn't it? é").ids) == "isn't it? é"
    assert library.token_to_id("<|endoftext|>") == HuggingFaceTokenizer(learnt_json, "t").end_of_text


def test_the_smallest_vocabulary_is_bytes(book: Path) -> None:
    tokenizer = HuggingFaceTokenizer(learnt(book, 257)[0], "t")
    assert tokenizer.vocabulary == 257
    assert len(tokenizer.encode("caf€")) == 6


def test_what_is_met_once_is_not_learnt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ab ab cd " + "q" * 5 + "\n" + "zz\n" * 3)
    tokenizer = HuggingFaceTokenizer(learnt(path, 5000, fraction=0.3)[0], "t")
    assert tokenizer.vocabulary < 270
    assert len(tokenizer.encode("ab")) == 1
    assert len(tokenizer.encode("cd")) == 2


def test_validation_text_is_not_learnt_from(tmp_path: Path) -> None:
    for index in range(30):
        held_out = part_of_document(index, 0.1, 1) is Part.VALIDATION
        (tmp_path / f"{index:02d}.txt").write_text("xylophone " * 500 if held_out else "ordinary words here " * 20)
    json_text, reading = learnt(tmp_path, 300)
    tokenizer = HuggingFaceTokenizer(json_text, "t")
    assert len(tokenizer.encode("xylophone")) > 6
    assert len(tokenizer.encode("ordinary")) <= 2
    training, validation = (reading.samples[part].bytes_per_token(tokenizer) for part in Part)
    assert training is not None
    assert validation is not None
    assert training > 4 > 2 > validation


def test_bytes_per_token_is_that_of_the_shards(open_source, book: Path, learnt_json: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(learnt_json, encoding="utf-8", newline="")
    dataset = open_source(book, tokenizer=str(tmp_path / "t.json"))
    reading = Reading(find_corpus(str(book)), fraction=0.1, seed=1)
    measure(reading)
    for part, source in ((Part.TRAIN, dataset.train), (Part.VALIDATION, dataset.validation)):
        assert reading.samples[part].bytes_per_token(dataset.tokenizer) == source.bytes_per_token
    assert reading.training_share.taken == 0


def test_no_more_is_learnt_from_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": f"line number {i} " * 4}) + "\n" for i in range(2000)))
    size = path.stat().st_size
    _, reading = learnt(path, 300, limit=size // 10)
    text_share = sum(len(json.loads(line)["text"]) for line in path.read_text().splitlines()) / size
    assert 0.9 * text_share <= reading.training_share.taken / (size / 10) <= 1.0


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(1, 5000))
def test_an_even_share(sizes: list[int], limit: int) -> None:
    share = EvenSubsample(limit, sum(sizes))
    chosen = []
    rate = min(1.0, limit / sum(sizes))
    for size in sizes:
        before, seen = share.taken, share.seen
        chosen.append(share.takes(size))
        assert share.taken <= seen * rate + max(sizes)  # never more than a piece ahead
        assert chosen[-1] or before > seen * rate or before >= limit  # nor behind without reason
    assert share.taken <= limit + 100
    assert share.seen == sum(sizes)
    assert all(chosen) or limit < sum(sizes)


@pytest.mark.parametrize("text", ["", "short words only\n", "x" * 256, " " * 700 + "y" * 257 + " z", "a " + "é" * 5000])
def test_long_runs_are_cut(text: str) -> None:
    parts = list(split_long_runs(text))
    assert "".join(parts) == text
    assert all(len(run) <= 256 for part in parts for run in re.findall(r"\S+|\s+", part))
    assert len(parts) <= 1 + len(text) // 256


def test_text_without_spaces_takes_no_time(tmp_path: Path) -> None:
    """Words of 64 KiB, learnt from in one piece, take thirty times as long, and the longer the text the worse."""
    draw = random.Random(1)
    path = tmp_path / "genome.txt"
    path.write_text("".join(draw.choices("ACGT", k=200_000)))
    began = time.process_time()
    assert HuggingFaceTokenizer(learnt(path, 500)[0], "t").vocabulary == 500
    assert time.process_time() - began < 3  # processor time: others on the machine do not count


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("twenty-four characters.\n" * 120_000)
    told: list[tuple[int, int]] = []
    corpus = find_corpus(str(path))
    measure(Reading(corpus, fraction=0.1, seed=1, progress=lambda done, total: told.append((done, total))))
    assert told == sorted(told)
    assert len(told) == 3
    assert told[-1] == (corpus.total_bytes, corpus.total_bytes)


@pytest.mark.parametrize("vocabulary", [256, 0, -1, (1 << 20) + 1])
def test_impossible_vocabularies(book: Path, vocabulary: int) -> None:
    with pytest.raises(UserError, match=f"vocabulary is {vocabulary}; it must lie between 257 .* and 1048576"):
        learnt(book, vocabulary)


def test_bad_text_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine text\n" * 100 + b"\xff")
    with pytest.raises(UserError, match="not UTF-8 text: invalid byte sequence at byte 1000"):
        learnt(path, 300)
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"too little text .* the train part is empty"):
        learnt(path.rename(tmp_path / "a.jsonl"), 300)
