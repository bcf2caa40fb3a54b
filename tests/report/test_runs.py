"""Reports: what is written is read back, and pictures show the curves they were given."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import sys

import pytest
from rich.console import Console

from cllm_gpu.config import Config, OptimizerConfig
from cllm_gpu.experiments.optimizer_comparison import Run, Setting, summarise, with_rate
from cllm_gpu.experiments.run_in_memory import Curve, Point
from cllm_gpu.model.gradcheck import GroupCheck
from cllm_gpu.report.comparison import comparison_table, plot_comparison
from cllm_gpu.report.gradcheck import gradient_data, gradient_table, print_checks
from cllm_gpu.report.runs import plot_runs, read_run, run_summary, runs_table
from cllm_gpu.report.table import Table, write_table
from cllm_gpu.training.metrics import MetricsLog
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError

CHECKS = [
    GroupCheck("token_embedding", 5140, 1.25, 1.25 + 1e-9, 8e-10, 1e-7, True),
    GroupCheck("blocks.0.qkv.weight", 1200, 0.5, -0.5, 2.0, 1e-7, False),
    GroupCheck("final_norm.bias", 12, math.nan, 0.1, math.nan, 1e-7, False),
]


def cells(markdown):
    """The table of a Markdown document as rows of cells, its escapes undone."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
    return [[cell.replace("\\_", "_").replace("\0", "|") for cell in row] for row in rows]


def shown(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table.rich(200))
    return console.file.getvalue()


def run(family, rate, losses, stopped=None):
    config = Config(optimizer=OptimizerConfig(name=family))
    points = tuple(Point(10 * n, 1.5 * n, loss) for n, loss in enumerate(losses, start=1))
    return Run(with_rate(Setting("", family, config), rate), Curve(points, stopped))


@pytest.fixture
def comparison():
    families = {
        "sgd": [run("sgd", 0.1, [4.0, 3.0, 2.5]), run("sgd", 1.0, [4.0, math.inf], "training stopped: too hot")],
        "adam": [run("adam", 0.001, [3.0, 2.5, 2.0]), run("adam", 0.01, [2.4, 2.3, 2.2])],
        "adamw": [run("adamw", 0.001, [9.0, 8.0, 7.0])],
    }
    return summarise(families, [r for grid in families.values() for r in grid], "sgd")


# ---- tables


def test_markdown_reads_back_as_the_table():
    table = Table("A | title", ("name", "n"), (("a|b_c", "1"), ("*d*", "2")), notes=("first_note",))
    text = table.markdown()
    assert text.splitlines()[0] == "# A \\| title"
    assert cells(text) == [["name", "n"], [":---", "---:"], ["a|b_c", "1"], ["\\*d\\*", "2"]]
    assert text.endswith("\n\nfirst\\_note\n")


def test_the_terminal_s_table_shows_text_as_it_is():
    text = shown(Table("t", ("name",), (("[red]not markup[/red]",),), notes=("and a note",)))
    assert "[red]not markup[/red]" in text
    assert "and a note" in text


def test_gradient_sheet_names_what_failed():
    table = gradient_table(CHECKS)
    assert [row[-1] for row in table.rows] == ["pass", "FAIL", "FAIL"]
    assert table.bad_rows == {1, 2}
    assert table.notes == ("2 of 3 groups FAILED; largest relative error nan, bound 1e-07.",)
    assert gradient_table(CHECKS[:1]).notes == ("all 1 groups passed; largest relative error 8.0e-10, bound 1e-07.",)
    assert float(table.rows[0][2]) == CHECKS[0].analytic
    assert float(table.rows[0][3]) == pytest.approx(CHECKS[0].numerical, rel=1e-9)


def test_checks_are_printed_unbroken_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=20)
    print_checks(CHECKS, console)
    line = next(line for line in console.file.getvalue().splitlines() if "blocks.0.qkv.weight" in line)
    assert "FAIL" in line


def test_gradient_data_is_json_that_reads_back(tmp_path):
    markdown, path = write_table(gradient_table(CHECKS), gradient_data(CHECKS), tmp_path / "new", "check")
    read = exact_json.loads(path.read_text(encoding="utf-8"))
    assert read["passed"] is False
    assert [GroupCheck(**group) for group in read["groups"][:2]] == CHECKS[:2]
    assert math.isnan(read["groups"][2]["relative_error"])
    assert [row[0] for row in cells(markdown.read_text(encoding="utf-8"))[2:]] == [c.name for c in CHECKS]


def test_comparison_sheet(comparison):
    table = comparison_table(comparison)
    assert table.rows == (
        ("sgd", "2", "0.1", "2.5000", "30", "1.00×", "4.5", "1.00×", "30", "1.00×"),
        ("adam", "2", "0.001", "2.0000", "20", "1.50×", "3.0", "1.50×", "10", "3.00×"),
        ("adamw", "1", "0.001", "7.0000", "–", "–", "–", "–", "–", "–"),
    )
    assert all(len(row) == len(table.header) for row in table.rows)
    notes = "\n".join(table.notes)
    assert "Target: 2.5000" in notes
    assert "best rate of sgd is at the end" in notes
    assert "sgd rate 1: training stopped: too hot" in notes


def test_comparison_as_json_reads_back(comparison, tmp_path):
    _, path = write_table(comparison_table(comparison), comparison.as_dict(), tmp_path, "comparison")
    read = exact_json.loads(path.read_text(encoding="utf-8"))
    json.loads(path.read_text(encoding="utf-8"))  # standard JSON, whatever diverged
    assert read == exact_json.loads(exact_json.dumps(comparison.as_dict()))
    assert read["target"] == 2.5
    assert read["runs"][1]["points"][1]["loss"] == math.inf
    assert read["runs"][2]["config"]["optimizer"]["rate"] == 0.001
    assert read["rows"][2]["steps"] is None


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_table(gradient_table(CHECKS), {}, tmp_path / "file", "check")


# ---- runs


def write_run(folder, steps=6):
    log = MetricsLog(folder / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.append(
            {
                "kind": "step",
                "step": step,
                "loss": 5.0 / step if step != 3 else math.nan,
                "smoothed_loss": 6.0 / step,
                "rate": 0.001,
                "gradient_norm": 2.0,
                "update_norm": 0.1,
                "skipped": "non-finite loss (nan)" if step == 3 else None,
                "tokens": 100 * step,
                "seconds": 0.1,
                "tokens_per_second": 1000.0 * step,
            }
        )
        if step % 2 == 0:
            loss = [4.0, 1.5, 1.75][step // 2 - 1]
            log.append(
                {
                    "kind": "evaluation",
                    "step": step,
                    "loss": loss,
                    "perplexity": math.exp(loss),
                    "bits_per_byte": loss / math.log(2),
                    "accuracy": 0.5,
                }
            )
    return folder


def test_a_run_is_read_from_its_folder_or_its_file(tmp_path):
    folder = write_run(tmp_path / "007")
    record = read_run(folder)
    assert repr(record) == repr(read_run(folder / "metrics.jsonl"))  # a NaN is not equal to itself
    assert record.name == "007"
    assert run_summary(record) == {
        "name": "007",
        "steps": 6,
        "tokens": 600,
        "training_loss": 1.0,
        "best_loss": 1.5,
        "best_step": 4,
        "bits_per_byte": 1.5 / math.log(2),
        "tokens_per_second": 4000.0,
        "skipped": 1,
        "mfu": None,
        "watts": None,
        "joules_per_token": None,
    }
    assert record.series("steps", "loss") == ([1, 2, 4, 5, 6], [5.0, 2.5, 1.25, 1.0, 5.0 / 6])
    assert record.series("evaluations", "loss") == ([2, 4, 6], [4.0, 1.5, 1.75])
    assert runs_table([record]).rows == (("007", "6", "600", "1.0000", "1.5000", "4", "2.1640", "4,000", "1"),)


def test_a_run_on_a_card_adds_its_figures_to_the_table(tmp_path):
    plain = read_run(write_run(tmp_path / "007"))
    steps = [step | {"mfu": 0.1 * number, "watts": 100.0 * number} for number, step in enumerate(plain.steps)]
    card = dataclasses.replace(plain, name="008", steps=(steps[0], plain.steps[1], *steps[2:]))
    table = runs_table([plain, card])
    assert table.header[-3:] == ("skipped", "MFU", "W")
    assert [row[-2:] for row in table.rows] == [("–", "–"), ("30.0%", "300")]
    assert table.notes == ("Training loss is smoothed; tokens/s, MFU, W: the median over the steps.",)


def test_a_run_without_evaluation_has_no_best(tmp_path):
    record = read_run(write_run(tmp_path, steps=1))
    assert runs_table([record]).rows[0][4:7] == ("–", "–", "–")


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no training ran in"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step of a run"):
        read_run(tmp_path)


# ---- pictures


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, kept for inspection."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, original = [], figure.savefig

    def kept(self, *arguments, **named):
        figures.append(self)
        return original(self, *arguments, **named)

    monkeypatch.setattr(figure, "savefig", kept)
    return figures


def test_the_picture_of_a_comparison_shows_every_curve(comparison, tmp_path, drawn):
    path = tmp_path / "new" / "comparison.png"
    plot_comparison(comparison, path)
    assert png_size(path) == (1320, 540)
    left, right = drawn[0].axes
    lines = {tuple(line.get_ydata()) for line in left.lines}
    assert {(4.0, 3.0, 2.5), (4.0,), (3.0, 2.5, 2.0), (2.4, 2.3, 2.2), (9.0, 8.0, 7.0)} <= lines
    by_loss = {tuple(line.get_ydata()): list(line.get_xdata()) for line in right.lines}
    assert by_loss[4.0, 3.0, 2.5] == [1.5, 3.0, 4.5]
    labels = {text.get_text() for text in right.get_legend().get_texts()}
    assert labels == {"sgd rate 0.1", "adam rate 0.001", "adamw rate 0.001"}


def test_the_picture_of_runs_shows_their_series(tmp_path, drawn):
    runs = [read_run(write_run(tmp_path / name)) for name in ("a", "b")]
    plot_runs(runs, tmp_path / "runs.png")
    assert png_size(tmp_path / "runs.png") == (1320, 840)
    loss = drawn[0].axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "a, training (smoothed)",
        "a, validation",
        "b, training (smoothed)",
        "b, validation",
    ]
    assert list(loss.lines[2].get_ydata()) == [4.0, 1.5, 1.75]


def test_no_window_system_is_asked_for(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    plot_comparison(comparison, tmp_path / "c.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_one_line_says_how_to_get_it(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'cllm-gpu\[plots\]'"):
        plot_comparison(comparison, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
