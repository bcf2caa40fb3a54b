"""A training step that runs on the device without the host: its inputs, decisions and results live there.

Steps are issued ahead of their results: while one runs, the host reads the results of the one before and prepares the
batch of the next. The first step is enqueued operation by operation, which compiles kernels and makes what is made
once; the second is captured as a graph, and that graph is launched for every step from then on. A step whose batch has
another number of ignored targets than the captured one has another factor in its loss, and is enqueued by itself.

What changes from step to step, the graph reads from the device: tokens, targets and their order, rate, the step's
number for the dropout masks; and what the device counts itself, updates (bias corrections, stochastic rounding) and
skips in a row. See docs/gpu-step.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.devices.buffers import Plan
from cllm_gpu.model.activations import batch_dropout
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.stream import Device, Graph, Mark
from cllm_gpu.optim.optimizer import Decision, Optimizer
from cllm_gpu.training.input_staging import Inlet
from cllm_gpu.utils.errors import UserError

AHEAD = 2
"""Steps that may be under way at once: one runs, one waits behind it."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """What every step of a run has in common."""

    architecture: Architecture
    batch: int
    micro_batch: int
    length: int
    """Tokens of a sequence."""
    seed: int
    maximum_skipped: int
    capture: bool
    """Whether to capture a step and replay it."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What the host learns of a step, once it is done."""

    loss: float
    """Mean over the targets that count, nats."""
    gradient_norm: float
    update_norm: float
    """0 where the step was skipped."""
    skipped: bool
    rate: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Host memory of one step that is under way."""

    inputs: np.ndarray[Any, Any]
    views: dict[str, Any]
    results: np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class _UnderWay:
    slot: _Slot
    end: Mark
    counted: int
    rate: float
    tokens: int


class DeviceStep:
    """Issues training steps on `backend.device` and gives their results in order, `AHEAD` of them under way at most."""

    def __init__(
        self,
        backend: Backend,
        device: Device,
        compute: Callable[..., Any],
        optimizer: Optimizer,
        parameters: FlatParameters,
        gradients: FlatParameters,
        shape: Shape,
        *,
        skipped_in_a_row: int,
    ) -> None:
        """`compute` is `GradientWorkers.compute_on_device`, or does the same for one micro-batch.

        `optimizer.updates` and `skipped_in_a_row` are where the device's counts begin.
        """
        self._device, self._stream, self._synchronize = device, device.stream, backend.synchronize
        self._compute, self._optimizer, self._shape = compute, optimizer, shape
        self._parameters, self._gradients = parameters, gradients
        self._ranges = backend.ranges
        self._storage = parameters.layout.dtype.name
        plan = _inputs_plan(shape)
        inputs, staging = (backend.zeros(plan.bytes, np.uint8) for _ in range(2))
        self._views = plan.allocate(lambda _: inputs)
        self._inlet = Inlet(device.stream, staging, inputs)
        self._decision = _decision(backend, self._views["rate"])
        # fewer than the limit, which only a skip of this run may reach
        counts = [optimizer.updates, min(skipped_in_a_row, shape.maximum_skipped - 1)]
        self._decision.counts[...] = backend.asarray(np.array(counts, np.int32))
        self._slots = [self._slot(plan) for _ in range(AHEAD)]
        self._under_way: deque[_UnderWay] = deque()
        self._issued = 0
        self._graph: Graph | None = None
        self._captured_count = 0
        self.capture_refused: str | None = None
        """Why no step could be captured; None where one was, or none has been tried."""

    def _slot(self, plan: Plan) -> _Slot:
        inputs = self._stream.pinned((plan.bytes,), np.uint8)
        return _Slot(inputs, plan.allocate(lambda _: inputs), self._stream.pinned((5,), np.float64))

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a captured one by now."""
        return self._graph is not None

    @property
    def under_way(self) -> int:
        """Steps issued whose results were not taken yet."""
        return len(self._under_way)

    def issue(self, step: int, tokens: Any, targets: Any, rate: float) -> None:
        """Enqueue step number `step` on tokens and targets (batch, length) int32, on the host, at this rate."""
        if len(self._under_way) >= AHEAD:
            raise ValueError(f"{AHEAD} steps are under way already")
        if not self._under_way:
            self._synchronize()  # our stream does not wait for the default one, on which all else is computed
        slot = self._slots[self._issued % AHEAD]
        self._fill(slot.views, step, tokens, targets, rate)
        counted = int(np.count_nonzero(targets != IGNORE_INDEX))
        self._inlet.send(slot.inputs)
        self._enqueue(counted)
        self._stream.download(self._decision.results, slot.results)
        self._under_way.append(_UnderWay(slot, self._stream.mark(), counted, rate, tokens.size))
        self._issued += 1

    def take(self) -> StepResult:
        """The results of the oldest step under way, waiting for it."""
        done = self._under_way.popleft()
        done.end.wait()
        loss, squared, *moved, skipped = map(float, done.slot.results)
        return StepResult(
            loss=loss / max(1, done.counted),
            gradient_norm=math.sqrt(squared),
            update_norm=0.0 if skipped else math.sqrt(sum(moved)),
            skipped=bool(skipped),
            rate=done.rate,
            tokens=done.tokens,
        )

    def abandon(self) -> None:
        """Wait for the steps under way and forget them: for a run that stops after too many skipped steps in a row,
        behind which the device applies none.
        """
        while self._under_way:
            self._under_way.popleft().end.wait()

    def _fill(self, views: dict[str, Any], step: int, tokens: Any, targets: Any, rate: float) -> None:
        views["tokens"][...] = tokens
        views["targets"][...] = targets
        for order, rows in zip(views["order"], self._parts(), strict=True):
            order[...] = np.argsort(tokens[rows].reshape(-1), kind="stable")
        views["rate"][0] = rate
        views["draw"][0] = step & 0xFFFFFFFF

    def _parts(self) -> list[slice]:
        size = self._shape.micro_batch
        return [slice(first, first + size) for first in range(0, self._shape.batch, size)]

    def _enqueue(self, counted: int) -> None:
        if self._wants_capture():
            try:
                self._graph, self._captured_count = self._stream.capture(lambda: self._work(counted)), counted
            except UserError as error:
                self.capture_refused = str(error)
        if self._graph is not None and counted == self._captured_count:
            self._graph.launch()
        else:
            self._stream.run(lambda: self._work(counted))

    def _wants_capture(self) -> bool:
        tried = self._graph is not None or self.capture_refused is not None
        return self._shape.capture and self._issued > 0 and not tried

    def _work(self, counted: int) -> None:
        """All of a step: nothing in here may allocate, or read a number that changes from step to step on the host."""
        views, decision = self._views, self._decision
        sums = decision.results[:2]
        for order, rows in zip(views["order"], self._parts(), strict=True):
            losses = self._compute(
                views["tokens"][rows],
                views["targets"][rows],
                self._gradients,
                order=order,
                gradient_scale=1.0 / max(1, counted),
                accumulate=rows.start > 0,
                dropout=batch_dropout(
                    self._shape.architecture, seed=self._shape.seed, step=views["draw"], first=rows.start
                ),
            )
            self._device.add_losses(losses, sums, accumulate=rows.start > 0, storage=self._storage)
        with self._ranges("optimizer"):
            self._device.squared_norm(self._gradients.flat, total=sums[1:])
            self._optimizer.apply_on_device(
                self._parameters, self._gradients, decision, maximum_skipped=self._shape.maximum_skipped
            )


def _inputs_plan(shape: Shape) -> Plan:
    """What the host tells the device of one step: one array of bytes, so that it is one copy."""
    plan = Plan()
    plan.add("rate", (1,), np.float64)
    plan.add("draw", (1,), np.uint32)
    plan.add("tokens", (shape.batch, shape.length), np.int32)
    plan.add("targets", (shape.batch, shape.length), np.int32)
    parts = shape.batch // shape.micro_batch
    plan.add("order", (parts, shape.micro_batch * shape.length), np.int64)
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
    )
