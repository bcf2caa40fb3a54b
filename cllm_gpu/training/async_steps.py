"""The steps of a training run on a device, each issued before the results of the one before it are read.

So the device never waits for Python, and the batch of the next step is prepared while this one runs. What has to see
the weights as they are after a step (an evaluation, a text, a checkpoint) finds no other step under way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config, TrainingConfig
from cllm_gpu.data import Batches
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.ops.stream import Device
from cllm_gpu.optim.optimizer import Optimizer
from cllm_gpu.optim.schedules import rate_at
from cllm_gpu.training.graph_step import DeviceStep, Shape, StepResult
from cllm_gpu.training.reporter import Reporter


def may_run_ahead(config: Config, backend: Backend) -> bool:
    """Whether the steps of a run are issued before the results of the one before are read."""
    return backend.device is not None and _why_wait(config) is None


def _why_wait(config: Config) -> str | None:
    """What the host has to know, or to see, in the middle of a step."""
    if config.training.spike_window:  # whether there is one, only the host knows
        return "to watch for spikes (training.spike_window = 0: they do not)"
    if config.training.diagnose_every:  # a look is at the gradients before the update
        return "for looks at their gradients (training.diagnose_every = 0: they do not)"
    return None


def how_steps_run(config: Config, device: Device) -> str:
    """One line for whoever watches a run on a device."""
    if (why := _why_wait(config)) is not None:
        return f"steps wait for their loss, one by one, {why}"
    how = device.replays if config.training.capture else "each kernel launched by itself, as asked"
    return f"steps run ahead of their results, {how}"


def stops_after(loop: TrainingConfig, done: int) -> bool:
    """Whether after so many steps the run ends, or the weights are evaluated, sampled from or saved."""
    often = (loop.evaluate_every, loop.sample_every, loop.checkpoint_every)
    return done >= loop.steps or any(every and done % every == 0 for every in often)


class StepsAhead:
    """Issues the steps of one run and gives their results in order."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        backend: Backend,
        compute: Callable[..., Any],
        optimizer: Optimizer,
        parameters: FlatParameters,
        gradients: FlatParameters,
        batches: Batches,
        reporter: Reporter,
        *,
        skipped_in_a_row: int,
    ) -> None:
        """`compute`, `optimizer` and `skipped_in_a_row` as in `DeviceStep`; `backend` has a device."""
        assert backend.device is not None
        self._config, self._backend, self._batches, self._reporter = config, backend, batches, reporter
        loop = config.training
        shape = Shape(
            architecture=architecture,
            batch=loop.sequences,
            micro_batch=loop.at_once,
            length=batches.context,
            seed=loop.seed,
            maximum_skipped=loop.maximum_skipped,
            capture=loop.capture,
        )
        self.step = DeviceStep(
            backend, backend.device, compute, optimizer, parameters, gradients, shape,
            skipped_in_a_row=skipped_in_a_row,
        )  # fmt: skip

    @property
    def under_way(self) -> int:
        """Steps issued whose results were not taken yet."""
        return self.step.under_way

    def take(self, done: int, *, further: bool) -> StepResult:
        """The results of the step after `done` ones; with `further` the one behind it is under way by then.

        Not where something stops between the two: then nothing is under way.
        """
        if not self.step.under_way:
            self._issue(done)
        if further and not stops_after(self._config.training, done + 1):
            self._issue(done + 1)
        return self.step.take()

    def abandon(self) -> None:
        """As `DeviceStep.abandon`."""
        self.step.abandon()

    def _issue(self, step: int) -> None:
        config, known = self._config, self.step.capture_refused
        rate = rate_at(config.schedule, config.optimizer.rate, config.training.steps, step)
        with self._backend.ranges("data"):
            tokens, targets = self._batches.batch(step)
        with self._backend.ranges("step"):
            self.step.issue(step, tokens, targets, rate)
        if self.step.capture_refused != known:
            self._reporter.message(f"steps are not captured: {self.step.capture_refused}")
