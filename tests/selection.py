"""Which tests run: `--device` says where, `--slow` whether the slow ones do. What is left out is counted in one line.

A test marked `gpu` runs on a card and nowhere else: with --device cupy they run, and only they; without, they are
deselected. A test marked `slow` is deselected without --slow. Nothing is skipped by these, so that a skip that is
reported always says something.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import pytest

from cllm_gpu.devices import driver

LEFT_OUT = pytest.StashKey[dict[str, int]]()
ADVICE = {
    "gpu": "{} tests need a GPU and were left out: pytest --device cupy",
    "cpu": "{} tests need no GPU and were left out: pytest",
    "slow": "{} slow tests were left out: pytest --slow, make test-all",
}
"""Reason → the line of the summary."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--device and --slow."""
    group = parser.getgroup("which tests run")
    where = "cpu: all but the tests marked gpu; cupy: these alone, on the card; an error where there is none"
    group.addoption("--device", choices=("cpu", "cupy"), default="cpu", help=where)
    group.addoption("--slow", action="store_true", help="also the tests marked slow")


@functools.cache
def gpu_obstacle() -> str | None:
    """What stands between the tests and a GPU, in one line; None when nothing does."""
    obstacle = driver.missing(driver.find_driver(), has_cupy=driver.has_cupy())
    if obstacle is not None:
        return obstacle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what CuPy's import warns of is not ours to mend
            cupy = importlib.import_module("cupy")
        return None if cupy.is_available() else "CuPy sees no device"
    except Exception as error:  # a broken install fails in its own ways; all of them mean: no GPU for the tests
        return f"CuPy does not start: {type(error).__name__}: {error}"


def pytest_configure(config: pytest.Config) -> None:
    """Raises UsageError, one line, where --device cupy finds no card."""
    config.stash[LEFT_OUT] = {}
    if config.getoption("--device") == "cupy" and (obstacle := gpu_obstacle()) is not None:
        raise pytest.UsageError(f"--device cupy: {obstacle}")


def _reason(item: pytest.Item) -> str | None:
    """Why `item` is left out, a key of ADVICE; None if it runs."""
    marked = item.get_closest_marker("gpu") is not None
    if item.config.getoption("--device") == "cupy":
        return None if marked else "cpu"  # what is slow on the simulator is not on a card
    if marked:
        return "gpu"
    return "slow" if item.get_closest_marker("slow") is not None and not item.config.getoption("--slow") else None


@pytest.hookimpl(trylast=True)  # after -k and -m: what they leave out is not counted here
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what the options leave out, and count it."""
    reasons = [_reason(item) for item in items]
    left_out = [item for item, reason in zip(items, reasons, strict=True) if reason is not None]
    items[:] = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
    config.hook.pytest_deselected(items=left_out)
    counts = {reason: reasons.count(reason) for reason in ADVICE if reason in reasons}
    config.stash[LEFT_OUT] = counts
    if hasattr(config, "workeroutput"):  # a worker of pytest-xdist: it collects, the controller reports
        config.workeroutput["left_out"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The controller of pytest-xdist takes over what a worker counted: they all collect the same tests."""
    node.config.stash[LEFT_OUT] |= getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each reason that left tests out."""
    for reason, count in config.stash[LEFT_OUT].items():
        terminalreporter.write_line(ADVICE[reason].format(count))
