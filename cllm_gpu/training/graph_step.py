"""A training step that runs on the device without the host: its inputs, decisions and results live there.

Steps are issued ahead of their results: while one runs, the host reads the results of the one before and prepares the
batch of the next, so the device never waits for Python. The first step is enqueued operation by operation, which
compiles kernels and makes what is made once; the second is captured as a graph, and that graph is launched for every
step from then on. A step whose batch has another number of ignored targets than the captured one has another factor in
its loss, and is enqueued by itself.

What changes from step to step, the graph reads from the device: tokens, targets and their order, rate, the step's
number for the dropout masks; and what the device counts itself, updates (bias corrections, stochastic rounding) and
skips in a row. See docs/gpu-step.md.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.config import TrainingConfig
from cllm_gpu.data import IGNORE_INDEX
from cllm_gpu.devices.buffers import Plan
from cllm_gpu.model.activations import batch_dropout
from cllm_gpu.ops.stream import Device, Event, Graph
from cllm_gpu.optim.optimizer import REFUSALS, Decision, Optimizer
from cllm_gpu.training.input_staging import InputStaging
from cllm_gpu.training.step import StepContext, StepResult, TrainingStep
from cllm_gpu.utils.errors import UserError


def why_on_host(loop: TrainingConfig, optimizer: Optimizer) -> str | None:
    """What the host has to know, to see or to do in the middle of a step; None if steps can run without it."""
    if loop.spike_window:  # whether there is one, only the host knows
        return "to watch for spikes (training.spike_window = 0: they do not)"
    if loop.diagnose_every:  # a look is at the gradients before the update
        return "for looks at their gradients (training.diagnose_every = 0: they do not)"
    return optimizer.device_obstacle


def how_steps_run(loop: TrainingConfig, optimizer: Optimizer, device: Device) -> str:
    """One line that tells the user how steps run on a device."""
    if (why := why_on_host(loop, optimizer)) is not None:
        return f"steps wait for their loss, one by one, {why}"
    how = device.replays if loop.capture else "each kernel launched by itself, as asked"
    return f"steps run ahead of their results, {how}"


@dataclass(frozen=True)
class _Slot:
    """Pinned host memory of one step that is under way."""

    inputs: np.ndarray[Any, Any]
    views: dict[str, Any]
    results: np.ndarray[Any, Any]


@dataclass(frozen=True)
class _UnderWay:
    slot: _Slot
    end: Event
    counted: int
    rate: float


class GraphStep(TrainingStep):
    """Enqueues steps on the device of the model's backend, captured as a graph if `training.capture` asks for it."""

    depth = 2  # one runs, one waits behind it

    def __init__(self, context: StepContext, compute: Callable[..., Any], report: Callable[[str], None]) -> None:
        """`compute` is `GradientWorkers.compute_on_device`, or does the same for one micro-batch.

        `optimizer.updates` and `guard.skipped_in_a_row` are where the device's counts begin. report: gets one line if
        no step can be captured.
        """
        backend, guard = context.model.backend, context.guard
        assert backend.device is not None
        self._context, self._compute, self._report = context, compute, report
        self._backend, self._device, self._stream = backend, backend.device, backend.device.stream
        plan = _inputs_plan(context)
        inputs, staging = (backend.zeros(plan.bytes, np.uint8) for _ in range(2))
        self._views = plan.allocate(lambda _: inputs)
        self._staging = InputStaging(self._stream, staging, inputs)
        self._decision = _decision(backend, self._views["rate"])
        # fewer than the limit, which only a skip of this run may reach
        counts = [context.optimizer.updates, min(guard.skipped_in_a_row, guard.maximum_skipped - 1)]
        self._decision.counts[...] = backend.asarray(np.array(counts, np.int32))
        norms = context.optimizer.norms(context.model.parameters)
        self._decision.norms[...] = backend.asarray(np.array(norms, np.float64))
        self._slots = [self._slot(plan) for _ in range(self.depth)]
        self._under_way: deque[_UnderWay] = deque()
        self._issued = 0
        self._graph: Graph | None = None
        self._captured_count = 0
        self.capture_refused: str | None = None
        """Why no step could be captured; None if one was, or none has been tried."""

    def _slot(self, plan: Plan) -> _Slot:
        inputs = self._stream.pinned((plan.bytes,), np.uint8)
        return _Slot(inputs, plan.allocate(lambda _: inputs), self._stream.pinned((5,), np.float64))

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a captured one by now."""
        return self._graph is not None

    @property
    def under_way(self) -> int:
        """Steps issued whose results have not been taken."""
        return len(self._under_way)

    def issue(self, step: int) -> None:
        """Enqueue step number `step`."""
        if len(self._under_way) >= self.depth:
            raise ValueError(f"{self.depth} steps are under way already")
        rate = self._context.rate(step)
        with self._backend.ranges("data"):
            tokens, targets = self._context.batches.batch(step)
        with self._backend.ranges("step"):
            if not self._under_way:
                self._backend.synchronize()  # our stream does not wait for the default one, where all else is computed
            slot = self._slots[self._issued % self.depth]
            self._fill(slot.views, step, tokens, targets, rate)
            counted = max(1, int(np.count_nonzero(targets != IGNORE_INDEX)))
            self._staging.upload(slot.inputs)
            self._enqueue(counted)
            self._stream.download(self._decision.results, slot.results)
            self._under_way.append(_UnderWay(slot, self._stream.record_event(), counted, rate))
            self._issued += 1

    def take(self) -> StepResult:
        """The result of the oldest step under way, waiting for it; counts its update, if it was applied."""
        done = self._under_way.popleft()
        done.end.synchronize()
        losses, squared, *moved, refused = map(float, done.slot.results)
        loss, norm = losses / done.counted, math.sqrt(squared)
        update_norm = 0.0 if refused else math.sqrt(sum(moved))
        if not refused:
            self._context.optimizer.count(norm, update_norm)
        skipped = self._context.guard.judge(loss, norm) or REFUSALS[int(refused)]
        return StepResult(loss, norm, update_norm, done.rate, skipped)

    def abandon(self) -> None:
        """Wait for the steps under way and forget them: for a run that stops after too many skipped steps in a row,
        behind which the device applies none.
        """
        while self._under_way:
            self._under_way.popleft().end.synchronize()

    def _fill(self, views: dict[str, Any], step: int, tokens: Any, targets: Any, rate: float) -> None:
        views["tokens"][...] = tokens
        views["targets"][...] = targets
        for order, rows in zip(views["order"], self._micro_batches(), strict=True):
            order[...] = np.argsort(tokens[rows].reshape(-1), kind="stable")
        views["rate"][0] = rate
        views["draw"][0] = step & 0xFFFFFFFF

    def _micro_batches(self) -> list[slice]:
        size = self._context.loop.at_once
        return [slice(first, first + size) for first in range(0, self._context.loop.sequences, size)]

    def _enqueue(self, counted: int) -> None:
        if self._wants_capture():
            try:
                self._graph, self._captured_count = self._stream.capture(lambda: self._work(counted)), counted
            except UserError as error:
                self.capture_refused = str(error)
                self._report(f"steps are not captured: {error}")
        if self._graph is not None and counted == self._captured_count:
            self._graph.launch()
        else:
            self._stream.run(lambda: self._work(counted))

    def _wants_capture(self) -> bool:
        tried = self._graph is not None or self.capture_refused is not None
        return self._context.loop.capture and self._issued > 0 and not tried

    def _work(self, counted: int) -> None:
        """All of a step: nothing in here may allocate, or read a number that changes from step to step on the host."""
        context, views, decision = self._context, self._views, self._decision
        parameters, gradients, sums = context.model.parameters, context.gradients, decision.results[:2]
        for order, rows in zip(views["order"], self._micro_batches(), strict=True):
            losses = self._compute(
                views["tokens"][rows],
                views["targets"][rows],
                gradients,
                order=order,
                gradient_scale=1.0 / counted,
                accumulate=rows.start > 0,
                dropout=batch_dropout(
                    context.model.architecture, seed=context.loop.seed, step=views["draw"], first=rows.start
                ),
            )
            storage = parameters.layout.dtype.name
            self._device.add_losses(losses, sums, accumulate=rows.start > 0, storage=storage)
        with self._backend.ranges("optimizer"):
            self._device.squared_norm(gradients.flat, total=sums[1:])
            maximum = context.guard.maximum_skipped
            context.optimizer.apply_on_device(parameters, gradients, decision, maximum_skipped=maximum)


def _inputs_plan(context: StepContext) -> Plan:
    """What the host tells the device of one step: one array of bytes, so that it is one copy."""
    batch, micro_batch, length = context.loop.sequences, context.loop.at_once, context.batches.context
    plan = Plan()
    plan.add("rate", (1,), np.float64)
    plan.add("draw", (1,), np.uint32)
    plan.add("tokens", (batch, length), np.int32)
    plan.add("targets", (batch, length), np.int32)
    plan.add("order", (batch // micro_batch, micro_batch * length), np.int64)
    return plan


def _decision(backend: Backend, rate: Any) -> Decision:
    return Decision(
        results=backend.zeros(5, np.float64),
        rate=rate,
        counts=backend.zeros(2, np.int32),
        numbers=backend.zeros(6, np.float32).reshape(2, 3),
        clip=backend.zeros(1, np.float32),
        skip=backend.zeros(1, np.int32),
        draw=backend.zeros(1, np.uint32),
        norms=backend.zeros(2, np.float64),
    )
