"""How fast a run's steps follow one another: seconds, tokens/s, and on a card MFU and power."""

from __future__ import annotations

import time
from collections.abc import Callable

from cllm_gpu.backend import Backend
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.flops import flop_per_token
from cllm_gpu.training.mean_power import MeanPower
from cllm_gpu.training.mfu import Throughput

FIGURES = ("seconds", "tokens_per_second", "mfu", "watts", "joules_per_token")
"""Of a step's record: what comes from a clock or a counter, and so differs from run to run."""


class StepTimer:
    """The clock of one run's steps, of `batch` sequences each."""

    def __init__(
        self,
        backend: Backend,
        architecture: Architecture,
        batch: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend, self._architecture, self._clock = backend, architecture, clock
        self._tokens = batch * architecture.context
        self._throughput: Throughput | None = None  # of a backend that has a peak
        self._power: MeanPower | None = None  # of one that counts energy
        self._last = clock()

    def begin(self) -> str | None:
        """Begin to count, now; one line on what the MFU is of, None if there is no MFU."""
        if self._backend.peak is not None:
            self._throughput = Throughput(flop_per_token(self._architecture), self._backend.peak())
        meter = None if self._backend.energy_meter is None else self._backend.energy_meter()
        self._power = None if meter is None else MeanPower(meter, self._clock)
        self.restart()
        return None if self._throughput is None else self._throughput.description

    def restart(self) -> None:
        """The next step begins now: what was done since the last one was no step."""
        self._last = self._clock()
        if self._power is not None:
            self._power.restart()

    def step(self) -> dict[str, float]:
        """A step is done: "seconds" since the one before it, "tokens_per_second"; where they are known, "mfu" (of 1),
        and of the last whole window (`MeanPower`) "watts" and "joules_per_token".
        """
        now = self._clock()
        seconds, self._last = now - self._last, now
        found = {"seconds": seconds, "tokens_per_second": self._tokens / seconds}
        if self._throughput is not None:
            found["mfu"] = self._throughput.utilisation(found["tokens_per_second"])
        draw = None if self._power is None else self._power.step(self._tokens)
        if draw is not None:
            found |= {"watts": draw.watts, "joules_per_token": draw.joules_per_token}
        return found
