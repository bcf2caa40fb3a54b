"""A batch split over threads of one process: each computes the loss and the gradients of its part.

The operations release Python's lock, so the threads run at once, each with activations and a gradient buffer of its own
and a single-threaded matrix product: no thread waits for another between operations. Afterwards the gradients are added
in the order of the workers, each thread adding one slice of the flat buffer. The same number of workers gives the same
bits at every run. On a GPU, and for one worker, everything is the plain call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from cllm_gpu.backend import Backend
from cllm_gpu.model.activations import Activations, plan_activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters, Layout
from cllm_gpu.model.recompute import Recompute
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.registry import OPERATIONS, Operations

SLICE_STEP = 1024
"""Slices of flat buffers begin at multiples of this many elements."""


def gradient_layout(layout: Layout, backend: Backend, batch: int, micro_batch: int) -> Layout:
    """Of the gradients of a model of `layout`: never below float32 where parts of a batch, micro-batches or those of
    several workers, add to them.
    """
    alone = micro_batch == batch and len(batch_parts(micro_batch, backend.workers)) == 1
    return layout if alone else layout.widened()


@dataclasses.dataclass(frozen=True)
class WorkersPlan:
    """Bytes a `GradientWorkers` will allocate."""

    activations: int
    """The activations of all workers."""
    gradients: int
    """The gradient buffers of all workers but the first, which uses the caller's."""


def workers_plan(
    architecture: Architecture,
    backend: Backend,
    layout: Layout,
    batch: int,
    length: int,
    *,
    training: bool = True,
    recompute: Recompute = "none",
    gradients: Layout | None = None,
) -> WorkersPlan:
    """What training (or, without `training`, evaluating) on batches (batch, length) takes, before it is allocated.

    gradients: their layout; None: the parameters', `layout`.
    """
    parts, gradients = batch_parts(batch, backend.workers), gradients or layout
    plan = partial(
        plan_activations,
        architecture,
        training=training,
        recompute=recompute,
        logit_chunks=backend.logit_chunks,
        gradient_dtype=gradients.dtype,
    )
    activations = sum(plan(part.stop - part.start, length, layout.dtype).bytes for part in parts)
    return WorkersPlan(activations, gradients.bytes * (len(parts) - 1) if training else 0)


def batch_parts(batch: int, workers: int) -> list[slice]:
    """`batch` sequences in at most `workers` contiguous parts, none empty, the larger ones first."""
    count = min(batch, workers)
    sizes = [batch // count + (index < batch % count) for index in range(count)]
    stops = [sum(sizes[: index + 1]) for index in range(count)]
    return [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]


class GradientWorkers:
    """Losses and gradients of batches (batch, length) of one model, computed by `model.backend.workers` threads.

    Also `ops`: the model's operations, with those on flat buffers (the optimizers' steps and the norm) split over the
    same threads. While it is open and has several workers, NumPy's matrix products are single-threaded.
    """

    def __init__(
        self,
        model: Transformer,
        batch: int,
        length: int,
        *,
        training: bool = True,
        recompute: Recompute = "none",
        gradients: Layout | None = None,
    ) -> None:
        """gradients: the layout of those to come; None: the parameters'."""
        backend, layout = model.backend, model.parameters.layout
        gradients = gradients or layout
        self._model, self._shape = model, (batch, length)
        self._parts = batch_parts(batch, backend.workers)
        self._activations = [
            Activations(
                model.architecture, backend, part.stop - part.start, length, layout.dtype,
                training=training, recompute=recompute, first_row=part.start * length, gradient_dtype=gradients.dtype,
            )
            for part in self._parts
        ]  # fmt: skip
        extra = len(self._parts) - 1 if training else 0
        self._gradients = [gradients.views(backend.zeros(gradients.size, gradients.dtype)) for _ in range(extra)]
        self._open = ExitStack()
        self._pool: ThreadPoolExecutor | None = None
        if backend.workers > 1:
            self._open.enter_context(threadpool_limits(1, user_api="blas"))
            self._pool = self._open.enter_context(ThreadPoolExecutor(backend.workers - 1, "worker"))
        self.ops = self._split_flat_operations(backend.ops)

    @property
    def activations(self) -> tuple[Activations, ...]:
        """Of every worker, in the order of the rows: they hold what the last batch left, for inspection."""
        return tuple(self._activations)

    def __enter__(self) -> GradientWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and give NumPy's matrix products theirs back."""
        self._open.close()
        self._pool = None

    def loss_and_gradients(
        self,
        tokens: Any,
        targets: Any,
        gradients: FlatParameters,
        *,
        gradient_scale: float,
        accumulate: bool,
        dropout: Dropout | None = None,
    ) -> float:
        """As `Transformer.loss_and_gradients`, on tokens and targets (batch, length)."""
        self._check(tokens, targets)
        buffers = [gradients, *self._gradients]

        def work(index: int) -> float:
            part = self._parts[index]
            return self._model.loss_and_gradients(
                self._activations[index], tokens[part], targets[part], buffers[index],
                gradient_scale=gradient_scale, accumulate=accumulate and index == 0, dropout=dropout,
            )  # fmt: skip

        losses = self._run([partial(work, index) for index in range(len(self._parts))])
        self._add_gradients(gradients.flat)
        return sum(losses)

    def compute_on_device(
        self,
        tokens: Any,
        targets: Any,
        gradients: FlatParameters,
        *,
        order: Any,
        gradient_scale: float,
        accumulate: bool,
        dropout: Dropout | None = None,
    ) -> Any:
        """As `loss_and_gradients`, without waiting for the device: the losses (batch·length,), left there.

        order: (batch·length,) int64, the positions sorted by their token. For a backend of one worker.
        """
        self._check(tokens, targets)
        activations = self._activations[0]
        activations.token_order = order
        try:
            self._model.compute_gradients(
                activations, tokens, targets, gradients,
                gradient_scale=gradient_scale, accumulate=accumulate, dropout=dropout,
            )  # fmt: skip
        finally:
            activations.token_order = None  # the next call may be of other tokens
        return activations.losses

    def losses(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """As `Transformer.losses`, on tokens and targets (batch, length)."""
        self._check(tokens, targets)

        def work(index: int) -> tuple[Any, Any]:
            part = self._parts[index]
            return self._model.losses(self._activations[index], tokens[part], targets[part])

        results = self._run([partial(work, index) for index in range(len(self._parts))])
        if len(results) == 1:
            return results[0]
        losses, hits = zip(*results, strict=True)
        return np.concatenate(losses), np.concatenate(hits)

    def _check(self, tokens: Any, targets: Any) -> None:
        if tokens.shape != self._shape or targets.shape != self._shape:
            raise ValueError(f"tokens {tokens.shape} and targets {targets.shape}: these workers take {self._shape}")

    def _run(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of all tasks in order: the first runs in this thread, each other in one of its own."""
        if self._pool is None:
            return [task() for task in tasks]
        # in the caller's context, where NumPy keeps its error settings
        others = [self._pool.submit(copy_context().run, task) for task in tasks[1:]]
        try:
            first = [tasks[0]()]
        finally:
            for other in others:
                other.exception()  # wait for all before anything is raised: they write into our buffers
        return first + [other.result() for other in others]

    def _slices(self, size: int) -> list[slice]:
        """A flat buffer of `size` elements, one slice for each worker."""
        blocks = -(-size // SLICE_STEP)
        parts = batch_parts(blocks, self._model.backend.workers)
        return [slice(part.start * SLICE_STEP, min(size, part.stop * SLICE_STEP)) for part in parts]

    def _add_gradients(self, flat: Any) -> None:
        if not self._gradients:
            return

        def add(part: slice) -> None:
            for other in self._gradients:
                flat[part] += other.flat[part]

        self._run([partial(add, part) for part in self._slices(flat.size)])

    def _split_flat_operations(self, ops: Operations) -> Operations:
        """`ops` with those on flat arrays, optimizers' steps and the norm, over slices of them, a thread for each."""
        if self._pool is None:
            return ops

        def split(operation: Callable[..., float]) -> Callable[..., float]:
            def over_slices(*arrays: Any, **settings: Any) -> float:
                def work(part: slice) -> float:
                    own = dict(settings)
                    if "decayed" in own:  # weight decay goes to a prefix of the whole array
                        own["decayed"] = min(max(own["decayed"] - part.start, 0), part.stop - part.start)
                    if own.get("rounding") is not None:
                        own["rounding"] = own["rounding"].after(part.start)
                    return operation(*(None if x is None else x[part] for x in arrays), **own)

                return sum(self._run([partial(work, part) for part in self._slices(arrays[0].size)]))

            return over_slices

        return ops.replace(**{name: split(getattr(ops, name)) for name, found in OPERATIONS.items() if found.flat})
