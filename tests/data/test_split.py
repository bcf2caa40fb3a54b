"""Train and validation: never empty, never overlapping, together the whole corpus."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data import Dataset, open_dataset, text
from cllm_gpu.data.split import Part, documents_needed, part_of_document
from cllm_gpu.utils.errors import UserError

END = 256


def contents(dataset: Dataset) -> tuple[list[str], list[str]]:
    """Documents of the train and the validation part; each part must end with an end of text."""
    parts = []
    for source in (dataset.train, dataset.validation):
        tokens = source.read(0, len(source)).tolist()
        assert tokens[-1] == END
        pieces, current = [], bytearray()
        for token in tokens:
            if token == END:
                pieces.append(current.decode())
                current = bytearray()
            else:
                current.append(token)
        assert all(pieces)
        parts.append(pieces)
        assert source.documents == len(pieces)
        assert source.text_bytes == sum(len(piece.encode()) for piece in pieces)
    return parts[0], parts[1]


@settings(deadline=None)
@given(fraction=st.floats(0.001, 0.5), seed=st.integers(0, 2**63), extra=st.integers(0, 2000))
def test_documents_held_out(fraction: float, seed: int, extra: int) -> None:
    count = documents_needed(fraction) + extra
    parts = [part_of_document(index, fraction, seed) for index in range(count)]
    held_out = parts.count(Part.VALIDATION)
    assert held_out >= 1
    assert parts.count(Part.TRAIN) >= 1
    assert abs(held_out - fraction * count) <= 1.5  # a group is off by half a document, the last may be incomplete


def test_the_seed_chooses_other_documents() -> None:
    chosen = [[part_of_document(index, 0.1, seed) for index in range(200)] for seed in (1, 2)]
    assert chosen[0] != chosen[1]
    places = Counter(index % 10 for seed in range(50) for index in range(10) if part_of_document(index, 0.1, seed))
    assert len(places) > 5


@pytest.fixture
def many(tmp_path: Path) -> list[str]:
    folder = tmp_path / "many"
    folder.mkdir()
    texts = [f"document {n} " * (n + 1) for n in range(40)]
    for n, content in enumerate(texts):
        (folder / f"{n:02}.txt").write_text(content)
    return texts


def test_by_document(open_source, tmp_path: Path, many: list[str]) -> None:
    train, validation = contents(open_source(tmp_path / "many"))
    assert len(validation) == 4
    assert sorted([*train, *validation]) == sorted(many)
    assert train == [content for content in many if content in train]  # in order
    again, other = (contents(open_source(tmp_path / "many", seed=seed))[1] for seed in (1, 2))
    assert again == validation
    assert other != validation


def test_few_documents_are_split_by_position(open_source, tmp_path: Path, many: list[str]) -> None:
    train, validation = contents(open_source(tmp_path / "many", validation_fraction=0.02))
    assert "".join([*train, *validation]) == "".join(many)
    total = len("".join(many))
    assert abs(len("".join(validation)) - 0.02 * total) <= 1


@pytest.mark.parametrize(
    ("content", "first_of_validation"),
    [
        ("line\n" * 100 + "\nparagraph\n" * 20, "paragraph"),
        ("line of text\n" * 100, "line of text"),
        ("x" * 999 + "y", "x"),
        ("€" * 501, "€"),
        ("x" * 100 + "\n\n", "x"),  # the only blank line is the end
    ],
)
def test_one_file_is_cut_at_a_good_place(open_source, tmp_path: Path, content: str, first_of_validation: str) -> None:
    (tmp_path / "a.txt").write_text(content, newline="")
    train, validation = contents(open_source(tmp_path / "a.txt"))
    assert (len(train), len(validation)) == (1, 1)
    assert train[0] + validation[0] == content
    assert validation[0].startswith(first_of_validation)
    assert 0.02 <= len(validation[0].encode()) / len(content.encode()) <= 0.11


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n€😀"), min_size=1, max_size=80), min_size=1, max_size=14),
    fraction=st.sampled_from([0.02, 0.1, 0.25, 0.5]),
    chunk=st.integers(1, 40),
    as_json=st.booleans(),
)
def test_nothing_is_lost_doubled_or_shared(
    tmp_path_factory, texts: list[str], fraction: float, chunk: int, as_json: bool
) -> None:
    folder = tmp_path_factory.mktemp("split")
    (folder / "in").mkdir()
    texts = [*texts, "some text that is long enough\nto be split in two parts"]
    if as_json:
        (folder / "in" / "a.jsonl").write_text("\n".join(json.dumps({"text": content}) for content in texts))
    else:
        for n, content in enumerate(texts):
            (folder / "in" / f"{n:02}.txt").write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", chunk)
        dataset = open_dataset(
            str(folder / "in"),
            tokenizer="bytes",
            validation_fraction=fraction,
            seed=3,
            cache_folder=folder / "cache",
            context=1,
        )
    train, validation = contents(dataset)
    if len(texts) >= documents_needed(fraction):
        assert sorted([*train, *validation]) == sorted(texts)
    else:
        assert "".join([*train, *validation]) == "".join(texts)
        assert len(train) + len(validation) <= len(texts) + 1
    assert dataset.bytes_per_token == sum(len(v.encode()) for v in validation) / len(dataset.validation)


def test_a_json_record_over_the_cut(open_source, tmp_path: Path) -> None:
    record = "word after word\n" * 100
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 7, "text": record}) + "\n")
    train, validation = contents(open_source(tmp_path / "a.jsonl"))
    assert train[0] + validation[0] == record
    assert validation[0].startswith("word")
    assert 0.08 < len(validation[0]) / len(record) < 0.12


@pytest.mark.parametrize("fraction", [0.0, -0.1, 0.6, 1.0, float("nan")])
def test_impossible_fractions(open_source, fraction: float) -> None:
    with pytest.raises(UserError, match="validation_fraction is"):
        open_source("patterns", validation_fraction=fraction)


def test_a_text_too_short_to_split(open_source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"too little text \(1 bytes\) to hold out 0.1 .* train part is empty"):
        open_source(tmp_path / "a.txt")
    assert not list((tmp_path / "cache").iterdir())
