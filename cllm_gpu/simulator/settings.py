"""How launches run where the call itself does not say: checked or not, and in what order the threads take turns."""

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
    """Count bank conflicts and sectors; checked launches only."""
    schedule: Schedule = field(default_factory=Schedule)


def _from_environment() -> Settings:
    return Settings(check=os.environ.get("CLLM_SIMULATOR_CHECK", "") not in ("", "0"))


_current: contextvars.ContextVar[Settings | None] = contextvars.ContextVar("cllm_simulator_settings", default=None)


def current() -> Settings:
    """The settings in force: of the innermost `settings(...)` block, else from $CLLM_SIMULATOR_CHECK."""
    return _current.get() or _from_environment()


@contextlib.contextmanager
def settings(
    *, check: bool | None = None, count_traffic: bool | None = None, schedule: Schedule | None = None
) -> Iterator[Settings]:
    """Within this block, launches that do not say otherwise run as given here; None leaves a setting as it is."""
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
