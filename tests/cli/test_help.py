"""The help of every command fits a terminal, ends with examples, and the examples do what they say."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.cli import COMMANDS, load_command, run
from tests.cli.conftest import SMALL, TEXT

Command = Callable[..., tuple[int, str, str]]
LONG = {
    "train": "the whole standard library",
    "tokenize stdlib --vocabulary 4096 --output stdlib.json": "the whole standard library",
    "compare --model.size tiny --training.steps 400 --output optimizers": "fifteen runs of 400 steps",
    "compare --data.source book.txt --model.size tiny --training.steps 5 --optimizers adamw "
    "--schedules constant cosine wsd": "a dozen runs; test_compare is shorter",
    'lattice runs/003 --prompt "three times three is" --output pictures': "test_lattice draws these",
    "compare --experiment experiments/crystalline_bytes.toml --seeds 1": "nine runs of 1200 steps",
}
"""Examples that are only parsed, and why."""
ITEM = {"ctx": "The number 2", "endings": ["squared is 4.", "x", "y", "z"], "label": 0}


@pytest.fixture
def show_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """show_help(command): what `cllm-gpu command --help` prints on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(name: str) -> str:
        with pytest.raises(SystemExit) as left:
            run([name, "--help"])
        assert left.value.code == 0
        return capsys.readouterr().out

    return call


def examples(text: str) -> list[str]:
    """The examples in a help, without the program's name and what a shell makes of `>`."""
    _, _, shown = text.partition("\nexamples:\n")
    lines = re.sub(r" \\\n +", " ", shown).splitlines()
    assert all(line.startswith(("  # ", "  cllm-gpu ", "  echo ")) for line in lines)
    return [line.split(" > ")[0].split("cllm-gpu", 1)[1].strip() for line in lines if line.startswith("  cllm-gpu")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_ends_with_examples(show_help: Callable[[str], str], name: str) -> None:
    text = show_help(name)
    assert max(map(len, text.splitlines())) <= 80
    found = examples(text)
    assert 2 <= len(found) <= 4
    for example in found:
        command, *arguments = shlex.split(example)
        assert command == name
        load_command(name).COMMAND.parse(arguments)


def test_every_long_example_is_one(show_help: Callable[[str], str]) -> None:
    assert set(LONG) <= {example for name in COMMANDS for example in examples(show_help(name))}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the examples name."""
    place = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("CLLM_CACHE_DIR", str(place / "cache"))
        patch.setenv("CLLM_BACKEND", "numpy")
        for name in ("text", "book", "other"):
            Path(f"{name}.txt").write_text(TEXT, encoding="utf-8")
        Path("hellaswag_val.jsonl").write_text(json.dumps(ITEM) + "\n", encoding="utf-8")
        for attention in ("standard", "standard", "crystalline"):
            flags = (*SMALL, "--training.steps", "2", "--training.diagnose-every", "1", "--quiet")
            assert run(["train", *flags, "--model.attention", attention]) == 0
        assert run(["export", "runs/001", "--output", "gpt2"]) == 0
    return place


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "train" else ()) for name in COMMANDS]
)
def test_examples_do_what_they_say(
    command: Command, show_help: Callable[[str], str], workplace: Path, prepared: Path, name: str
) -> None:
    if name in ("lattice", "report"):
        pytest.importorskip("matplotlib")
    shutil.copytree(prepared, workplace, dirs_exist_ok=True)
    if name == "export":
        shutil.rmtree("gpt2")  # it writes what import reads
    for example in examples(show_help(name)):
        if example not in LONG:
            status, _, err = command(*shlex.split(example))
            assert (status, err) == (0, ""), example
