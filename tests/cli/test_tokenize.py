"""cllm-gpu tokenize: what it writes trains, nothing half done is left, and mismatches are refused by name."""

from __future__ import annotations

import _thread
import json
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.data.split import Part, SplitPiece
from cllm_gpu.data.tokenizers import END_OF_TEXT_NAMES, load_tokenizer
from cllm_gpu.training.run_folder import newest_run

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]


def training_command(out: str) -> list[str]:
    """The words after "cllm-gpu" of the line that says how to train."""
    (line,) = (line for line in out.splitlines() if line.startswith("train with it: cllm-gpu train "))
    return shlex.split(line)[4:]


def named(path: str) -> str:
    """The tokenizer as messages name it."""
    return f"{path} ({load_tokenizer(path).fingerprint[:8]})"


def test_learn_train_generate_evaluate(command: Command, workplace: Path, small: Flags) -> None:
    status, out, err = command("tokenize", "text.txt", "--vocabulary", "300")
    assert (status, err) == (0, "")
    assert "vocabulary 300, bytes per token: " in out
    assert f"written: {named('tokenizer.json')}" in out
    training, validation = map(float, re.findall(r"(\d\.\d+) (?:training|validation)", out))
    assert 1.5 < validation < 10
    assert 1.5 < training < 10
    assert command("tokenize", "text.txt", "--vocabulary", "300", "--output", "again/t.json")[0] == 0
    assert (workplace / "again" / "t.json").read_bytes() == (workplace / "tokenizer.json").read_bytes()

    words = training_command(out)
    assert words == ["train", "--data.source", "text.txt", "--data.tokenizer", "tokenizer.json"]
    status, out, err = command(*words, *small[2:], "--training.steps", "20", "--optimizer.rate", "0.01")
    assert (status, err) == (0, "")
    assert "vocabulary 300" in out
    assert load_checkpoint(newest_run()).tokenizer["name"] == "tokenizer.json"

    (workplace / "tokenizer.json").unlink()  # a checkpoint holds its tokenizer
    assert command("generate", "The number", "--tokens", "8", "--temperature", "0")[1].startswith("The number")
    status, out, _ = command("evaluate", "text.txt", "--json")
    assert status == 0
    assert json.loads(out)["bits_per_byte"] < 8


def test_generation_ends_at_the_end_of_text(command: Command, workplace: Path, small: Flags) -> None:
    (workplace / "lines.jsonl").write_text(json.dumps({"text": "the cat sat on the mat."}) + "\n")
    lines = (workplace / "lines.jsonl").read_text() * 40
    (workplace / "lines.jsonl").write_text(lines)
    status, out, _ = command("tokenize", "lines.jsonl", "--vocabulary", "270")
    assert status == 0
    flags = (*small[2:], "--training.steps", "60", "--optimizer.rate", "0.01", "--training.sample-tokens", "0")
    assert command(*training_command(out), *flags)[0] == 0
    assert command("generate", "--temperature", "0", "--tokens", "60")[:2] == (0, "the cat sat on the mat.\n")


def test_shards_ahead_of_time(command: Command, workplace: Path, small: Flags) -> None:
    assert command("tokenize", "text.txt", "--vocabulary", "280", "--output", "other.json")[0] == 0
    status, out, err = command("tokenize", "text.txt", "--vocabulary", "300", "--shards", "sets/text")
    assert (status, err) == (0, "")
    assert re.search(r"train: 1 document, [\d,]+ tokens, \d\.\d+ bytes per token", out)
    assert sorted(path.name for path in (workplace / "sets").rglob("*")) == [
        "text",
        "train.tokens",
        "validation.tokens",
    ]
    words = training_command(out)
    assert words == ["train", "--data.source", "sets/text", "--data.tokenizer", "tokenizer.json"]
    (workplace / "text.txt").rename(workplace / "moved.txt")
    assert command(*words, *small[2:], "--training.steps", "2")[0] == 0
    for other in ("bytes", "other.json"):
        status, _, err = command(*words[:-1], other, *small[2:], "--training.steps", "2")
        assert status == 2
        assert f"another tokenizer: {named('tokenizer.json')}, here it is {named(other)};" in err
        assert err.count("\n") == 1, err


def test_a_tokenizer_that_is_there_is_measured(command: Command, workplace: Path) -> None:
    status, out, _ = command("tokenize", "text.txt", "--tokenizer", "bytes", "--seed", "7")
    assert status == 0
    assert "bytes: vocabulary 257, bytes per token: 1.000 training, 0.999 validation" in out
    assert training_command(out)[-4:] == ["--data.tokenizer", "bytes", "--data.seed", "7"]
    assert not (workplace / "tokenizer.json").exists()


def test_resuming_with_another_tokenizer(command: Command, workplace: Path, small: Flags) -> None:
    _, out, _ = command("tokenize", "text.txt", "--vocabulary", "300")
    before = named("tokenizer.json")
    assert command(*training_command(out), *small[2:], "--training.steps", "2")[0] == 0
    (workplace / "tokenizer.json").unlink()
    (workplace / "other.txt").write_text("quite another text, with other words\n" * 50)
    assert command("tokenize", "other.txt", "--vocabulary", "300")[0] == 0
    assert named("tokenizer.json") != before
    status, _, err = command("train", "--resume", "--training.steps", "3", "--data.tokenizer", "bytes")
    assert status == 2
    assert f"another tokenizer: {before}, here it is {named('bytes')}; resume with the tokenizer it had" in err
    assert err.count("\n") == 1, err
    (workplace / "text.txt").rename(workplace / "elsewhere.txt")  # the checkpoint's tokenizer and the cache suffice
    status, out, _ = command("train", "--resume", "--training.steps", "3")
    assert status == 0
    assert "training goes on with the tokens prepared from it then, in " in out
    (workplace / "elsewhere.txt").rename(workplace / "text.txt")
    said = command("generate", "The", "--tokens", "5")
    assert command("generate", "The", "--tokens", "5") == said  # with the tokenizer the checkpoint holds


def test_a_changed_tokenizer_in_a_checkpoint_is_refused(command: Command, workplace: Path, small: Flags) -> None:
    _, out, _ = command("tokenize", "text.txt", "--vocabulary", "300")
    assert command(*training_command(out), *small[2:], "--training.steps", "2")[0] == 0
    (manifest,) = workplace.glob("runs/001/checkpoints/*/manifest.json")
    data = manifest.read_bytes()
    assert data.count(b"number") >= 1  # a token that was learnt
    manifest.write_bytes(data.replace(b"number", b"nubmer"))
    for arguments in (
        ["generate", "x", "--model", "runs/001"],
        ["evaluate", "text.txt", "--model", "runs/001"],
        ["train", "--resume", "--output", "runs/001"],
    ):
        status, _, err = command(*arguments)
        assert status == 2
        assert "manifest.json is damaged" in err
        assert err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "SOURCE"),
        (["text.txt", "--vocabulary", "256"], "vocabulary is 256; it must lie between 257"),
        (["text.txt", "--vocabulary", "1048577"], "and 1048576"),
        (["text.txt", "--vocabulary", "many"], "--vocabulary"),
        (["nowhere.txt"], "nowhere.txt"),
        (["empty.txt"], "empty.txt is empty"),
        (["blank.jsonl"], "too little text"),
        (["latin.txt"], "latin.txt is not UTF-8 text"),
        (["patterns"], "patterns is not a text"),
        (["ids.bin"], "ids.bin holds tokens, not text"),
        (["text.txt", "--output", "text.txt"], "text.txt exists already: name another with --output"),
        (["text.txt", "--output", "text.txt/t.json"], "cannot write text.txt/t.json: a file is where a folder"),
        (["text.txt", "--output", "."], "exists already"),
        (["text.txt", "--shards", "text.txt"], "text.txt exists already: name another with --shards"),
        (["text.txt", "--validation-fraction", "0.9"], "it must be above 0 and at most 0.5"),
        (["text.txt", "--megabytes", "0"], "--megabytes is 0"),
        (["text.txt", "--tokenizer", "none.json"], "none.json"),
        (["text.txt", "--tokenizer", "bytes", "--output", "t.json"], "give only one of them"),
        (["text.txt", "--tokenizer", "bytes", "--vocabulary", "300"], "give only one of them"),
        (["text.txt", "--tokenizer", "endless.json"], "endless.json has no end-of-text token: one of <|endoftext|>"),
        (["text.txt", "--tokenizer", "patterns"], "the letters A to Z"),
    ],
)
def test_bad_input(command: Command, workplace: Path, arguments: list[str], expected: str) -> None:
    (workplace / "empty.txt").write_bytes(b"")
    (workplace / "blank.jsonl").write_text('\n{"text": ""}\n')
    (workplace / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (workplace / "ids.bin").write_bytes(bytes(2048))
    (workplace / "endless.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    before = sorted(workplace.rglob("*"))
    status, _, err = command("tokenize", *arguments)
    assert status == 2
    assert expected in err
    assert err.startswith("cllm-gpu: error: ")
    assert err.count("\n") == 1, err
    assert sorted(workplace.rglob("*")) == before


def test_what_ends_a_text_is_listed(command: Command, workplace: Path) -> None:
    (workplace / "endless.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    _, _, err = command("train", "--data.source", "text.txt", "--data.tokenizer", "endless.json")
    assert all(name in err for name in END_OF_TEXT_NAMES)


def test_control_c_leaves_nothing(command: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pressed while a text of a minute is read: the command ends, its reading too, and no file is there."""
    ended = threading.Event()

    def endless(*_: object) -> Iterator[SplitPiece]:
        try:
            for number in range(1, 60_000):  # a minute: what is not interrupted fails, and does not hang
                yield SplitPiece(Part.TRAIN, "some words ", 11, number, last=True)
                if number == 1000:
                    _thread.interrupt_main()
                time.sleep(0 if number < 1000 else 0.001)
        finally:
            ended.set()

    monkeypatch.setattr("cllm_gpu.data.bpe.split_pieces", endless)
    before = sorted(workplace.rglob("*"))
    status, _, err = command("tokenize", "text.txt")
    assert (status, err) == (130, "cllm-gpu: interrupted\n")
    assert ended.wait(20)
    assert sorted(workplace.rglob("*")) == before


def test_help_fits_a_terminal_of_80_columns(command: Command, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        command("tokenize", "--help")
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert "--vocabulary" in out
    assert max(map(len, out.splitlines())) <= 80
