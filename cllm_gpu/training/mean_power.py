"""The mean power of a GPU while it trains.

A mean over a window is the difference of two readings of the energy counter over the seconds between them: no sampling,
and nothing to do in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from cllm_gpu.devices.energy import EnergyMeter

WINDOW = 1.0
"""Seconds of a mean at least: the counter itself moves only some times a second."""


@dataclass(frozen=True)
class PowerDraw:
    """Of one window."""

    watts: float
    joules_per_token: float


class MeanPower:
    """What a card draws while it trains, in windows of at least WINDOW seconds."""

    def __init__(self, meter: EnergyMeter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock = meter, clock
        self._last: PowerDraw | None = None
        self.restart()

    def restart(self) -> None:
        """A window begins now: what was drawn before is not counted."""
        self._begun, self._joules, self._tokens = self._clock(), self._meter.joules(), 0

    def step(self, tokens: int) -> PowerDraw | None:
        """A step of so many tokens is done: what the last whole window says, None before the first."""
        self._tokens += tokens
        seconds = self._clock() - self._begun
        if seconds >= WINDOW:
            before, spent = self._joules, self._tokens
            self.restart()
            if before is not None and self._joules is not None:
                joules = self._joules - before
                self._last = PowerDraw(joules / seconds, joules / spent)
        return self._last
