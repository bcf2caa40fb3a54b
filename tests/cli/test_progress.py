"""What a terminal shows fits it, at every width; a pipe gets whole lines."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from cllm_gpu.cli.progress import ConsoleReporter, byte_progress, count_progress, say, terminal
from cllm_gpu.report.table import Table, print_table

RECORD = {"step": 99_999, "loss": 10.123, "smoothed_loss": 10.456, "rate": 2e-3, "gradient_norm": 123.45}
RECORD |= {"tokens_per_second": 1_234_567.0}
"""Figures as long as they get."""


def screen(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, soft_wrap=True, highlight=False)


def lines(console: Console) -> list[str]:
    """Everything that was shown, also what was written over later; without colours and movements."""
    assert isinstance(console.file, io.StringIO)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.mark.parametrize("card", [{}, {"mfu": 0.4567}, {"mfu": 0.4567, "watts": 1234.5, "joules_per_token": 1e-3}])
@pytest.mark.parametrize("width", [40, 80, 119, 120, 130, 139, 140, 200])
def test_the_live_line_of_training_fits(width: int, card: dict[str, float]) -> None:
    console = screen(width)
    display = ConsoleReporter(console, 100_000, lambda: None)
    with display.running(99_000):
        display.step(RECORD | card)
    shown = lines(console)
    assert max(map(len, shown)) <= width
    assert "…" not in "".join(shown)
    (last,) = [line for line in shown if "99999/100000" in line][-1:]
    assert re.search(r"loss 10\.\d{3}", last)
    assert re.search(r"\d:\d\d$|-:--$", last.rstrip())
    assert ("1,234,567" in last) == (width >= 80)
    assert ("MFU 46%" in last) == (bool(card) and width >= 130)
    assert (" 1234 W" in last) == ("watts" in card and width >= 140)


@pytest.mark.parametrize("width", [40, 80])
def test_other_live_lines_fit(width: int) -> None:
    console = screen(width)
    with byte_progress(console, "reading text", then="learning tokens") as progress:
        progress(27_900_000, 131_500_000)
        time.sleep(0.15)  # more than the tenth of a second after which a live line is drawn again
    with count_progress(console, "evaluating", 10_042) as count:
        count(1024, "acc 31.4% norm 35.9%")
        time.sleep(0.15)
    shown = lines(console)
    assert any("27.9 MB of 131.5 MB" in line for line in shown)
    assert any("acc 31.4% norm 35.9%" in line and "1024/10042" in line.replace(" ", "") for line in shown)
    assert max(map(len, shown)) <= width
    assert "…" not in "".join(shown)


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_breaks_lines_between_words(width: int) -> None:
    text = "model: 842,624 parameters: 4 layers, width 128, 4 heads of 32, context 128, vocabulary 257"
    console = screen(width)
    say(text, console)
    assert max(map(len, lines(console))) <= width
    assert " ".join(line.strip() for line in lines(console)) == text
    command = screen(width)
    say(text, command, unbroken=True)
    assert lines(command) == [text]


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    display = ConsoleReporter(terminal(), 100_000, lambda: None)
    with display.running(0):
        display.step(RECORD | {"step": 1})
        display.step(RECORD | {"step": 2})
        display.step(RECORD | {"step": 100_000})
    out = capsys.readouterr().out
    assert out.count("\n") == 2  # the second step is none of the few that a pipe hears of
    assert out.startswith(
        "step 1/100000  loss 10.1230  smoothed 10.4560  rate 2.00e-03  gradient 123.45  1,234,567 tok"
    )
    assert "\x1b" not in out


def test_quiet_is_quiet_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what it writes to for a terminal
    console = terminal(quiet=True)
    assert console.is_terminal
    display = ConsoleReporter(console, 10, lambda: None)
    with display.preparing() as progress, count_progress(console, "items", 3) as count:
        progress(1, 2)
        count(1, "items")
    with display.running(0):
        display.step(RECORD | {"step": 1})
        display.message("text")
    assert display.sample("a", ["b", "c"]) == "bc"
    assert capsys.readouterr() == ("", "")


TABLE = Table(
    "Runs",
    ("run", "training loss", "size", "result"),
    (("a_long_name_of_a_run", "1.2345", "1,234,567", "pass"), ("short", "2.3456", "1", "FAIL")),
    bad_rows=frozenset({1}),
    notes=("A note.",),
    spare_columns=(2,),
)


def test_a_table_breaks_headers_never_cells() -> None:
    console = screen(60)
    print_table(TABLE, console)
    shown = lines(console)
    assert shown[0].strip() == "Runs"
    assert [line.split() for line in shown[-3:-1]] == [list(row) for row in TABLE.rows]


def test_a_narrow_table_leaves_out_what_can_be_spared() -> None:
    console = screen(40)
    print_table(TABLE, console)
    shown = lines(console)
    assert [line.split() for line in shown if "_name_" in line] == [["a_long_name_of_a_run", "1.2345", "pass"]]
    assert shown[-1].strip() == "Too narrow to show: size."
    assert max(map(len, shown)) <= 40


def test_a_table_too_wide_becomes_lists() -> None:
    console = screen(34)
    print_table(TABLE, console)
    shown = [line.split() for line in lines(console)]
    assert ["size", "1,234,567"] in shown
    assert ["result", "FAIL"] in shown
    assert max(map(len, lines(console))) <= 34
