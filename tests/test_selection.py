"""Which tests run by --device and --slow, and that what is left out is told in one line, by pytest-xdist too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.slow
@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_both(name): pass

@pytest.mark.gpu
def test_card(): pass
"""
CONFTEST = """
from tests import selection
from tests.selection import *

selection.gpu_obstacle = lambda: {obstacle!r}
"""
SETTINGS = "[pytest]\nmarkers =\n  gpu\n  slow\naddopts = --strict-markers\n"
WITHOUT_CARD = "2 tests need a GPU and were left out: pytest --device cupy"
WITHOUT_SLOW = "2 slow tests were left out: pytest --slow, make test-all"


def _run(folder: Path, *options: str, obstacle: str | None = "no card here") -> tuple[int, str]:
    """Exit status and output of pytest over TESTS, where `obstacle` stands between the tests and a GPU."""
    (folder / "conftest.py").write_text(CONFTEST.format(obstacle=obstacle), encoding="utf-8")
    (folder / "pytest.ini").write_text(SETTINGS, encoding="utf-8")
    (folder / "test_some.py").write_text(TESTS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_not_run_is_reported_with_the_reason(tmp_path: Path) -> None:
    status, output = _run(tmp_path)
    assert status == 0, output
    assert "1 passed, 4 deselected" in output
    assert output.splitlines().count(WITHOUT_CARD) == output.splitlines().count(WITHOUT_SLOW) == 1


def test_the_slow_ones_run_when_they_are_asked_for(tmp_path: Path) -> None:
    status, output = _run(tmp_path, "--slow")
    assert status == 0, output
    assert "3 passed, 2 deselected" in output
    assert output.splitlines().count(WITHOUT_CARD) == 1
    assert "slow tests" not in output


def test_side_by_side_it_is_reported_once(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    status, output = _run(tmp_path, "-p", "xdist", "-n", "2")
    assert status == 0, output
    assert "1 passed" in output
    assert output.splitlines().count(WITHOUT_CARD) == output.splitlines().count(WITHOUT_SLOW) == 1


def test_a_required_gpu_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    status, output = _run(tmp_path, "--device", "cupy")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert output.strip() == "ERROR: --device cupy: no card here"


def test_on_a_card_only_its_tests_run_and_none_of_them_is_slow(tmp_path: Path) -> None:
    status, output = _run(tmp_path, "--device", "cupy", obstacle=None)
    assert status == 0, output
    assert "2 passed, 3 deselected" in output
    assert "test_both[cupy] PASSED" in output
    assert "test_card PASSED" in output
    assert output.splitlines().count("3 tests need no GPU and were left out: pytest") == 1
    assert "slow tests" not in output
