"""The parts of a check: subprocesses with a time limit each, so that one that hangs does not block the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.paths import ROOT

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
TIMED_OUT = 124


@dataclass(frozen=True)
class Outcome:
    """The outcome of one part."""

    name: str
    status: str
    """PASSED, FAILED or NOT_RUN."""
    detail: str
    """One line of detail."""
    seconds: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "part": self.name,
            "status": self.status,
            "detail": self.detail,
            "seconds": round(self.seconds, 1),
            **({"data": self.data} if self.data else {}),
        }


@dataclass(frozen=True)
class Finished:
    """A finished program, or one terminated at its time limit (exit status 124)."""

    status: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    seconds: float
    """Its share of the time."""
    needs_card: bool
    run: Callable[[float], Outcome]
    """Called with its time limit in seconds."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and all its child processes, which would otherwise share the GPU with the next part."""
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)


def run_program(command: list[str], seconds: float, log: Path | None = None, **environment: str) -> Finished:
    """Run a program in the project's folder with the project on its PYTHONPATH, for at most `seconds`.

    log: file for a copy of the output; environment: additional variables.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | environment
    begun, status = time.monotonic(), TIMED_OUT
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output = process.communicate(timeout=seconds)[0]
        status = process.returncode
    except subprocess.TimeoutExpired:
        _end(process)
        output = process.communicate()[0]
    except BaseException:  # Ctrl-C reaches only this process: the program has its own session
        _end(process)
        raise
    text = output.decode(errors="replace")
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(text, encoding="utf-8")
    return Finished(status, text, time.monotonic() - begun)


def last_line(finished: Finished) -> str:
    """The last nonblank line of the output."""
    lines = [line for line in finished.output.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"exit status {finished.status}, no output"


def module(name: str, *arguments: str) -> list[str]:
    """The command line that runs a module with this Python."""
    return [sys.executable, "-m", name, *arguments]


def outcome_of(name: str, finished: Finished, detail: str | None = None) -> Outcome:
    """PASSED for exit status 0. detail: default is the last line of the output."""
    if finished.status == TIMED_OUT:
        return Outcome(name, FAILED, f"out of time after {finished.seconds:.0f} s", finished.seconds)
    status = PASSED if finished.status == 0 else FAILED
    return Outcome(name, status, detail or last_line(finished), finished.seconds)


def read_junit(path: Path) -> dict[str, int]:
    """Counts of a pytest run: passed, failed, errors, skipped. Empty if there is no report."""
    if not path.is_file():
        return {}
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    return {"passed": passed, "failed": total["failures"], "errors": total["errors"], "skipped": total["skipped"]}


def tests_outcome(name: str, finished: Finished, counts: dict[str, int]) -> Outcome:
    """PASSED if pytest succeeded and at least one test passed."""
    if finished.status == TIMED_OUT or not counts:
        return outcome_of(name, Finished(finished.status or 1, finished.output, finished.seconds))
    detail = ", ".join(f"{count} {what}" for what, count in counts.items())
    good = finished.status == 0 and counts["passed"] > 0
    return Outcome(name, PASSED if good else FAILED, detail, finished.seconds, dict(counts))
