"""Finding and streaming text: documents come through whole, and bad text is one clear line."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data import text
from cllm_gpu.data.sources import find_corpus
from cllm_gpu.data.text import cut_position
from cllm_gpu.utils.errors import UserError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
MIXED_TEXT = st.text(st.sampled_from("ab \n\r\té€😀"), max_size=200)


def documents(source: str | Path) -> list[str]:
    """The documents of a source; also checks that positions run on without gaps backwards."""
    corpus = find_corpus(str(source))
    found, current, reached = [], "", 0
    for piece in corpus.pieces():
        assert reached <= piece.start <= piece.end <= corpus.total_bytes
        assert piece.text
        assert piece.text_bytes == len(piece.text.encode())
        current, reached = current + piece.text, piece.end
        if piece.last:
            found.append(current)
            current = ""
    assert current == ""
    return found


@settings(max_examples=80, deadline=None)
@given(content=ANY_TEXT | MIXED_TEXT, chunk=st.integers(1, 9))
def test_a_file_is_one_document_whatever_the_chunks(tmp_path_factory, content: str, chunk: int) -> None:
    path = tmp_path_factory.mktemp("source") / "a.txt"
    content = content.replace("\0", "")  # which is refused as binary data
    path.write_bytes(("x" + content).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", chunk)
        assert documents(path) == ["x" + content]


@settings(max_examples=60, deadline=None)
@given(contents=st.lists(ANY_TEXT | MIXED_TEXT, max_size=6), chunk=st.integers(1, 9))
def test_each_json_line_is_a_document(tmp_path_factory, contents: list[str], chunk: int) -> None:
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    contents = [*contents, "x"]
    lines = [json.dumps({"n": 1, "text": content}, ensure_ascii=chunk % 2 == 0) for content in contents]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "CHUNK_BYTES", chunk)
        assert documents(path) == [content for content in contents if content]


@settings(deadline=None)
@given(MIXED_TEXT)
def test_cuts_move_forward(content: str) -> None:
    cut = cut_position(content)
    assert 0 <= cut <= len(content)
    assert (cut == 0) == (content == "")


def test_cuts_are_where_tokenizers_cut(bpe_json: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cllm_gpu.data.tokenizers import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer(bpe_json, "t")
    content = "the cat sat\n\n  on the mat,\nthe dog\n\ton the log.\n" * 40
    (tmp_path / "a.txt").write_bytes(content.encode())
    monkeypatch.setattr(text, "CHUNK_BYTES", 100)
    pieces = [piece.text for piece in find_corpus(str(tmp_path / "a.txt")).pieces()]
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(content).tolist()


def test_line_ends_stay_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")
    assert documents(tmp_path / "a.txt") == ["a\r\nb\rc\n"]


def test_a_folder_is_read_in_order_without_hidden_binary_and_empty_files(tmp_path: Path) -> None:
    for name, content in [
        ("b.txt", b"B"),
        ("a/z.md", b"AZ"),
        ("a/c.jsonl", b'{"text": "J1"}\n{"text": "J2"}\n'),
        (".hidden.txt", b"H"),
        (".git/x.txt", b"G"),
        ("image.png", b"\x89PNG\0\0"),
        ("empty.txt", b""),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert documents(tmp_path) == ["B", "J1", "J2", "AZ"]
    assert find_corpus(str(tmp_path)).skipped == 1


def test_a_glob(tmp_path: Path) -> None:
    for name in ("2.txt", "1.txt", "3.md"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "*.txt") == ["1.txt", "2.txt"]
    (tmp_path / "odd[1].txt").write_text("literal")
    assert documents(tmp_path / "odd[1].txt") == ["literal"]


def test_the_standard_library() -> None:
    corpus = find_corpus("stdlib")
    names = [file.name for file in corpus.files]
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or not name.endswith(".py")]
    assert names == [file.name for file in find_corpus("stdlib").files]
    assert corpus.total_bytes > 5_000_000


def test_undecodable_modules_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "bad.py").write_bytes(b"# -*- coding: latin-1 -*-\n'\xe9'")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "third.py").write_text("y = 2")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = find_corpus("stdlib")
    assert [piece.text for piece in corpus.pieces()] == ["x = 1"]
    assert corpus.skipped == 1
    (tmp_path / "good.py").unlink()
    (tmp_path / "bad.py").unlink()
    with pytest.raises(UserError, match=r"has no .py files"):
        find_corpus("stdlib")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data at .*missing.txt.*give stdlib, patterns"):
        find_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="holds no text files"):
        find_corpus(str(tmp_path))
    with pytest.raises(UserError, match=r"no text file matches .*\*.txt"):
        find_corpus(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a.txt is empty"):
        find_corpus(str(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"all 2 files of .* are empty"):
        find_corpus(str(tmp_path))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"abcd\xff", 4),
        ("é€".encode() + b"\xe2\x82(", 5),
        (b"abc\xf0\x9f\x98", 3),  # ends inside a character
        (b"ab\xed\xa0\x80", 2),  # a surrogate
    ],
)
def test_text_that_is_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, offset: int, chunk: int
) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.txt is not UTF-8 text: invalid byte sequence at byte {offset};"):
        documents(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 1}', r'a.jsonl:3: no text in the field "text" \(fields: body, id\)'),
        (b'{"text": 5}', r'a.jsonl:3: no text in the field "text"'),
        (b"{}", r"fields: none"),
        (b'{"text": "x"', r"a.jsonl:3: not JSON \(Expecting ',' delimiter\)"),
        (b'["text"]', r"a.jsonl:3: not a JSON object"),
        (b"plain words", r"a.jsonl:3: not JSON"),
        (b'{"text": "\\ud800"}', r"a.jsonl:3: lone surrogate U\+D800"),
        (b'{"text": "\xff"}', r"a.jsonl is not UTF-8 text: invalid byte sequence at byte 28"),
        (b"[" * 200_000, r"a.jsonl:3: not JSON \(nested too deeply\)"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        documents(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LONGEST_RECORD_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 200 + '"}')
    with pytest.raises(UserError, match=r"a.jsonl:1: line is longer than 100 bytes"):
        documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_changes_meanwhile(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "x"}\n')
    corpus = find_corpus(str(tmp_path / name))
    (tmp_path / name).write_text('{"text": "x"}\n\n')
    with pytest.raises(UserError, match=r"changed while it was read \(14 bytes became 15\)"):
        list(corpus.pieces())


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    corpus = find_corpus(str(tmp_path / "a.txt"))

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a.txt: no permission"):
        list(corpus.pieces())


def test_identity_follows_names_sizes_and_times(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = find_corpus(str(path)).identity
    assert find_corpus(str(path)).identity == first
    os.utime(path, ns=(1, 1))
    second = find_corpus(str(path)).identity
    path.write_text("three")
    os.utime(path, ns=(1, 1))
    assert len({first, second, find_corpus(str(path)).identity}) == 3
