"""A training step that the host takes part in: loss and gradient norm are read before the update."""

from __future__ import annotations

from collections import deque

import numpy as np

from cllm_gpu.data import IGNORE_INDEX
from cllm_gpu.model.activations import batch_dropout
from cllm_gpu.training.data_parallel import GradientWorkers
from cllm_gpu.training.diagnostics import Look, is_due
from cllm_gpu.training.metrics import MetricsLog
from cllm_gpu.training.step import StepContext, StepResult, TrainingStep


class HostStep(TrainingStep):
    """Computes a step as it is issued."""

    depth = 1

    def __init__(self, context: StepContext, workers: GradientWorkers, diagnostics: MetricsLog | None) -> None:
        """diagnostics: gets a record of every step that `training.diagnose_every` asks for; None if none is kept."""
        self._context, self._workers, self._diagnostics = context, workers, diagnostics
        self._results: deque[StepResult] = deque()

    @property
    def under_way(self) -> int:
        """0 or 1."""
        return len(self._results)

    def issue(self, step: int) -> None:
        """Compute step number `step`."""
        if self._results:
            raise ValueError("the result of the step before has not been taken")
        optimizer, gradients, model = self._context.optimizer, self._context.gradients, self._context.model
        loss = self.loss_and_gradients(step)
        with model.backend.ranges("optimizer"):
            norm = optimizer.gradient_norm(gradients)
            skipped = self._context.guard.judge(loss, norm)
            look = self._look(step + 1)
            rate, update = self._context.rate(step), 0.0
            if skipped is None:
                report = optimizer.apply(model.parameters, gradients, rate=rate, gradient_norm=norm)
                update = report.update_norm
                skipped = report.refused
        if look is not None and self._diagnostics is not None:
            self._diagnostics.append(look.record(step + 1, skipped))
        self._results.append(StepResult(loss, norm, update, rate, skipped))

    def take(self) -> StepResult:
        """The result of the step that was issued."""
        return self._results.popleft()

    def abandon(self) -> None:
        """Forget the result of the step that was issued."""
        self._results.clear()

    def loss_and_gradients(self, step: int) -> float:
        """Gradients of the batch of `step`, over micro-batches; returns the mean loss in nats."""
        context, backend = self._context, self._context.model.backend
        with backend.ranges("data"):
            tokens, targets = context.batches.batch(step)
            counted = max(1, int(np.count_nonzero(targets != IGNORE_INDEX)))
        total = 0.0
        for first in range(0, len(tokens), context.loop.at_once):
            rows = slice(first, first + context.loop.at_once)
            total += self._workers.loss_and_gradients(
                backend.asarray(tokens[rows]),
                backend.asarray(targets[rows]),
                context.gradients,
                gradient_scale=1.0 / counted,
                accumulate=first > 0,
                dropout=batch_dropout(context.model.architecture, seed=context.loop.seed, step=step, first=first),
            )
        return total / counted

    def _look(self, step: int) -> Look | None:
        """The look at step number `step`, from 1, before its update; None if none is due."""
        if self._diagnostics is None or not is_due(self._context.loop.diagnose_every, step):
            return None
        model = self._context.model
        weights = self._context.optimizer.weights(model.parameters)
        return Look(model, self._workers.activations, self._context.gradients, weights)
