"""Default settings of launches: whether accesses are checked, and the thread schedule."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from cllm_gpu.simulator.launch import Schedule


@dataclass(frozen=True)
class Settings:
    """Defaults of every launch within a `settings(...)` block."""

    check: bool = False
    """Check every memory access (slower)."""
    count_traffic: bool = False
    """Count bank conflicts and sectors; only in checked launches."""
    schedule: Schedule = field(default_factory=Schedule)


def _from_environment() -> Settings:
    return Settings(check=os.environ.get("CLLM_SIMULATOR_CHECK", "") not in ("", "0"))


_current: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("cllm_simulator_settings", default=None)


def current() -> Settings:
    """The current settings: those of the innermost `settings(...)` block, else from $CLLM_SIMULATOR_CHECK."""
    return _current.get() or _from_environment()


@contextlib.contextmanager
def settings(
    *, check: bool | None = None, count_traffic: bool | None = None, schedule: Schedule | None = None
) -> Iterator[Settings]:
    """A context manager that changes the default settings of launches; None leaves a setting unchanged."""
    outer = current()
    chosen = Settings(
        check=outer.check if check is None else check,
        count_traffic=outer.count_traffic if count_traffic is None else count_traffic,
        schedule=schedule or outer.schedule,
    )
    token = _current.set(chosen)
    try:
        yield chosen
    finally:
        _current.reset(token)
