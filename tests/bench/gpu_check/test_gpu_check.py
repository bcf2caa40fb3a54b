"""make gpu-check: what runs with a card and without one, what the exit status says, what is written."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check import __main__ as gpu_check
from bench.gpu_check import machine, subprocesses
from bench.gpu_check.subprocesses import (
    FAILED,
    NOT_RUN,
    PASSED,
    Finished,
    Outcome,
    Part,
    outcome_of,
    read_junit,
    run_program,
)
from bench.training import gpt2_training
from cllm_gpu.devices import driver as gpu
from tests.bench.fakes import MACHINE

NO_DRIVER = "no NVIDIA driver found"
BESIDE = {"beside": "PyTorch 9", "products": "matrix products by cuBLASLt 12"}
ROWS = [
    {
        "kernel": "copy ceiling", "side": "device copy", "size": {"bytes": 1}, "milliseconds": 1.0, "note": "",
        "tera_per_second": 4.0, "unit": "TB/s",
    },
    {
        "kernel": "cross-entropy", "side": "ours", "size": {"N": 1}, "milliseconds": 1.0, "note": "",
        "tera_per_second": 3.0, "unit": "TB/s",
    },
]  # fmt: skip


def fake_parts(*, failing: str = "") -> list[Part]:
    """One part for the host and two for a card."""

    def part(name: str, *, card: bool) -> Part:
        data = {"rows": ROWS, "machine": BESIDE} if name == "benchmarks" else {}
        status = FAILED if name == failing else PASSED
        return Part(name, 10, card, lambda seconds: Outcome(name, status, f"{name} ended", 1.0, data))

    return [part("host", card=False), part("tests", card=True), part("benchmarks", card=True)]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    """check(card, parts, *flags): exit status and output of a check of these parts."""
    monkeypatch.delenv("CLLM_REQUIRE_GPU", raising=False)

    def run(card: bool, chosen: list[Part], *flags: str) -> tuple[int, str]:
        obstacle = None if card else f"{NO_DRIVER}; install one"
        monkeypatch.setattr(gpu, "missing", lambda driver, has_cupy: obstacle)
        monkeypatch.setattr(gpu_check, "all_parts", lambda output=tmp_path: chosen)
        monkeypatch.setattr(machine, "facts", lambda: MACHINE)
        status = gpu_check.main(["--output", str(tmp_path), *flags])
        return status, capsys.readouterr().out

    return run


def test_without_a_card_what_needs_none_runs_and_one_line_says_so(check: Any, tmp_path: Path) -> None:
    status, printed = check(False, fake_parts())
    assert status == 0
    assert "host ended" in printed
    assert "tests ended" not in printed
    assert printed.count("not run") == 3  # two parts and the last line
    assert printed.splitlines()[-1].startswith("no card: the card's part was not run (no NVIDIA driver found")
    assert list(tmp_path.iterdir()) == [], "nothing was measured, so nothing is written"


def test_a_required_card_that_is_missing_is_a_failure(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_REQUIRE_GPU", "1")
    status, printed = check(False, fake_parts())
    assert status == 1
    assert printed.splitlines()[-1].startswith("no card: the card's part was not run")


def test_a_failure_of_the_hosts_part_is_one_without_a_card_too(check: Any) -> None:
    assert check(False, fake_parts(failing="host"))[0] == 1


def test_the_result_holds_the_parts_the_rows_and_the_bars() -> None:
    outcomes = [Outcome("tests", PASSED, ""), Outcome("benchmarks", PASSED, "", 1.0, {"rows": ROWS, "machine": BESIDE})]
    content = gpu_check.result_of(MACHINE, outcomes)
    assert content["machine"] == MACHINE | BESIDE
    assert [part["part"] for part in content["parts"]] == ["tests", "benchmarks"]
    assert content["ceilings"] == {"copy_terabytes": 4.0, "gemm_teraflops": None}
    bar = next(bar for bar in content["bars"] if bar["what"].startswith("cross-entropy"))
    assert (bar["measured"], bar["required"], bar["verdict"]) == (0.75, 0.85, "below")


@pytest.mark.parametrize("failing", ["tests", "benchmarks"])
def test_a_part_that_fails_is_a_failure_and_the_rest_is_kept(check: Any, tmp_path: Path, failing: str) -> None:
    status, _ = check(True, fake_parts(failing=failing))
    assert status == 1
    (path,) = tmp_path.iterdir()
    statuses = {part["part"]: part["status"] for part in json.loads(path.read_text(encoding="utf-8"))["parts"]}
    assert statuses[failing] == FAILED
    assert sorted(statuses.values()) == [FAILED, PASSED]


def test_only_some_parts(check: Any) -> None:
    status, printed = check(True, fake_parts(), "--only", "tests")
    assert status == 0
    assert "tests ended" in printed
    assert "benchmarks ended" not in printed
    with pytest.raises(SystemExit):
        check(True, fake_parts(), "--only", "nonsense")


def test_time_left_over_is_the_next_parts_and_none_begins_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, given = [0.0], []
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])

    def part(name: str, takes: float) -> Part:
        def run(seconds: float) -> Outcome:
            given.append(seconds)
            now[0] += takes
            return Outcome(name, PASSED, "")

        return Part(name, 100, True, run)

    chosen = [part("a", 40), part("b", 160), part("c", 95), part("d", 1)]
    outcomes = gpu_check.run_parts(chosen, card=True, seconds=297, obstacle=None)
    assert given == [100, 160, 97]
    assert [o.status for o in outcomes] == [PASSED, PASSED, PASSED, FAILED]
    assert outcomes[-1].detail == "not begun: out of time"


def test_what_all_parts_together_do_not_claim_is_the_firsts() -> None:
    """So a part that is asked for alone has the whole time."""
    given = []

    def part(name: str) -> Part:
        return Part(name, 100, True, lambda seconds: (given.append(round(seconds)), Outcome(name, PASSED, ""))[1])

    gpu_check.run_parts([part("training")], card=True, seconds=600, obstacle=None)
    gpu_check.run_parts([part("a"), part("b")], card=True, seconds=600, obstacle=None)
    assert given == [600, 500, 600]


def test_the_cards_parts_take_less_than_ten_minutes() -> None:
    chosen = gpu_check.all_parts()
    assert sum(part.seconds for part in chosen if part.needs_card) < 600
    assert len({part.name for part in chosen}) == len(chosen)
    assert chosen[-1].name == gpu_check.TRAINING, "what the others leave is what it needs"


@pytest.mark.parametrize(("limit", "batches"), [(590.0, None), (100.0, "1")])
def test_training_has_its_limit_its_folder_and_prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: float, batches: str | None
) -> None:
    """One batch of every model where there is time for few; it ends by itself, before it would be ended."""
    asked: list[list[str]] = []
    output = "124M, B=64, ours …\n---- results\n\nmodel B\n124M 64\n\n2 of 3 rows timed\n"

    def program(command: list[str], seconds: float, log: Path) -> Finished:
        assert seconds == limit
        asked.append(command)
        return Finished(0, output, 1.0)

    monkeypatch.setattr(gpu_check, "run_program", program)
    outcome = gpu_check.training_part(100, tmp_path).run(limit)
    assert (outcome.status, outcome.detail) == (PASSED, "2 of 3 rows timed")
    assert outcome.data["tables"] == "model B\n124M 64\n\n2 of 3 rows timed"
    options = gpt2_training.parse(asked[0][2:])
    assert options.output == tmp_path
    assert 0 < 60 * options.minutes < limit
    assert options.batches == (gpt2_training.BATCHES if batches is None else int(batches))


def test_a_program_that_hangs_is_ended_with_what_it_started_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    program = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(90)"])  # holds our output open
print("begun")
time.sleep(90)
"""
    done = run_program([sys.executable, "-c", program], 2.0, log)
    assert done.seconds < 60
    assert outcome_of("x", done).detail.startswith("out of time after")
    assert outcome_of("x", done).status == FAILED
    assert "begun" in log.read_text(encoding="utf-8")


def test_programs_find_the_checkout_and_their_environment() -> None:
    program = "import cllm_gpu, bench.gpu_check.subprocesses, os; print(os.environ['SAID'])"
    done = run_program([sys.executable, "-c", program], 60.0, SAID="hello")
    assert outcome_of("x", done) == Outcome("x", PASSED, "hello", done.seconds)


def test_a_pytest_part_counts_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real command over a small file of tests marked gpu, with a plain one that must be left out."""
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xdist" else spec(name))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts sooner
    tests = tmp_path / "test_some.py"
    conftest = "from tests import selection\nfrom tests.selection import *\nselection.gpu_obstacle = lambda: None\n"
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")  # the tests' own, as if there were a card
    marked = "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert {b}\n"
    tests.write_text(marked.format(b=True) + "def test_plain(): assert False\n", encoding="utf-8")
    outcome = gpu_check.pytest_part("tests", 60, str(tests)).run(60)
    assert (outcome.status, outcome.data) == (PASSED, {"passed": 2, "failed": 0, "errors": 0, "skipped": 0})
    tests.write_text(marked.format(b=False), encoding="utf-8")
    outcome = gpu_check.pytest_part("tests", 60, str(tests)).run(60)
    assert (outcome.status, outcome.detail) == (FAILED, "1 passed, 1 failed, 0 errors, 0 skipped")
    tests.write_text("", encoding="utf-8")
    assert gpu_check.pytest_part("tests", 60, str(tests)).run(60).status == FAILED, "no test ran"


def test_a_report_that_is_not_there_has_no_counts(tmp_path: Path) -> None:
    assert read_junit(tmp_path / "none.xml") == {}
    assert subprocesses.tests_outcome("t", Finished(0, "", 1.0), {}).status == FAILED


def test_a_missing_sanitizer_is_not_run_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    outcome = gpu_check.sanitizer_part("racecheck", 30).run(30)
    assert outcome.status == NOT_RUN
    assert "CUDA toolkit" in outcome.detail


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.missing_packages() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ml_dtypes" else object())
    found = gpu_check.missing_packages()
    assert found is not None
    assert found.startswith("ml_dtypes not installed here")


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb")]
)
def test_names_of_result_files(name: str, slug: str) -> None:
    about = {"card": name, "date": "2026-01-02T03:04:05+00:00"}
    assert machine.result_path(Path("x"), about) == Path("x") / f"{slug}-2026-01-02.json"


def test_facts_of_the_host() -> None:
    found = machine.host_facts()
    assert found["packages"]["numpy"]
    assert found["date"].endswith("+00:00")
