"""Default settings of launches: whether accesses are checked, and the thread schedule."""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cllm_gpu.simulator.launch import Schedule
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Defaults of every launch within a `settings(...)` block."""

    check: bool = False
    """Check every memory access (slower)."""
    count_traffic: bool = False
    """Count bank conflicts and sectors; only in checked launches."""
    schedule: Schedule = field(default_factory=Schedule)
    seconds: float = 600.0
    """Most processor time of one launch; 0: without a limit."""


def _from_environment() -> Settings:
    return Settings(
        check=os.environ.get("CLLM_SIMULATOR_CHECK", "") not in ("", "0"),
        seconds=_seconds("CLLM_SIMULATOR_SECONDS", os.environ.get("CLLM_SIMULATOR_SECONDS") or Settings.seconds),
    )


def _seconds(name: str, value: Any) -> float:
    """A time limit as a number. Raises UserError if it is none."""
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{name} is {value!r}; it must be the most seconds of a launch (0: no limit)")
    return seconds


_current: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("cllm_simulator_settings", default=None)


def current() -> Settings:
    """The current settings: those of the innermost `settings(...)` block, else from $CLLM_SIMULATOR_CHECK and
    $CLLM_SIMULATOR_SECONDS."""
    return _current.get() or _from_environment()


@contextlib.contextmanager
def settings(
    *,
    check: bool | None = None,
    count_traffic: bool | None = None,
    schedule: Schedule | None = None,
    seconds: float | None = None,
) -> Iterator[Settings]:
    """A context manager that changes the default settings of launches; None leaves a setting unchanged."""
    outer = current()
    chosen = Settings(
        check=outer.check if check is None else check,
        count_traffic=outer.count_traffic if count_traffic is None else count_traffic,
        schedule=schedule or outer.schedule,
        seconds=outer.seconds if seconds is None else _seconds("seconds", seconds),
    )
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
