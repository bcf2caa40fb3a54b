"""A training run that writes no files and returns its evaluations as a curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.training.signals import Stopped
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class Point:
    """An evaluation: the validation loss (nats/token) after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run, in order."""

    points: tuple[Point, ...]
    stopped: str | None = None
    """Why the run ended early; None if it did not."""

    @property
    def best(self) -> Point | None:
        """The first evaluation with the lowest loss; None if no loss was finite."""
        return min((p for p in self.points if math.isfinite(p.loss)), key=lambda p: p.loss, default=None)

    def reach(self, loss: float) -> Point | None:
        """The first evaluation with at most this loss; None if there is none."""
        return next((p for p in self.points if p.loss <= loss), None)


def run_in_memory(config: Config, backend: Backend, dataset: Dataset) -> Curve:
    """Train `config` from its seed, in memory, and return its evaluations; the curve ends early if training stopped.

    Raises Stopped if a signal asks to stop.
    """
    recorder = CurveRecorder()
    trainer = Trainer(config, backend, dataset, reporter=recorder)
    stopped = None
    try:
        trainer.initialise()
        with np.errstate(all="ignore"):  # overflow is expected if the learning rate is too high
            outcome = trainer.train()
            if outcome.interrupted:
                raise Stopped(outcome.signal)
    except UserError as error:
        stopped = str(error)
    finally:
        trainer.close()
    return Curve(tuple(recorder.points), stopped)


class CurveRecorder:
    """A `reporter.Reporter` that records the evaluations and the training time before each."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._seconds = 0.0

    def step(self, record: dict[str, Any]) -> None:
        """Add the time of a step."""
        self._seconds += record["seconds"]

    def evaluation(self, record: dict[str, Any]) -> None:
        """Record an evaluation."""
        self.points.append(Point(record["step"], self._seconds, record["loss"]))

    def message(self, text: str) -> None:
        """Ignore the message: the reason for a stop is recorded with the curve."""
