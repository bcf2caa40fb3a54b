"""One training step, whatever computes it: it is issued by its number, and its result is taken afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from cllm_gpu.config import TrainingConfig
from cllm_gpu.data import Batches
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.optim.optimizer import Optimizer
from cllm_gpu.training.loss_guard import LossGuard


@dataclass(frozen=True)
class StepContext:
    """What the steps of a run compute with."""

    loop: TrainingConfig
    model: Transformer
    optimizer: Optimizer
    gradients: FlatParameters
    batches: Batches
    rate: Callable[[int], float]
    """Learning rate of a step, by its number from 0."""
    guard: LossGuard
    """Judges every step; the code that takes the results reports the outcome to it."""


@dataclass(frozen=True)
class StepResult:
    """What is known of a step once it is done."""

    loss: float
    """Mean over the targets that are not ignored, nats."""
    gradient_norm: float
    """Before clipping."""
    update_norm: float
    """0 if the step was skipped."""
    rate: float
    skipped: str | None
    """Why the update was not applied, in one line; None if it was."""


class TrainingStep(ABC):
    """Computes the steps of one run; results are taken in the order in which the steps were issued."""

    depth: ClassVar[int]
    """Steps that may be issued before the result of the first is taken."""

    @property
    @abstractmethod
    def under_way(self) -> int:
        """Steps issued whose results have not been taken."""

    @abstractmethod
    def issue(self, step: int) -> None:
        """Begin step number `step`, from 0. ValueError if `depth` steps are under way."""

    @abstractmethod
    def take(self) -> StepResult:
        """The result of the oldest step under way, once it is done."""

    @abstractmethod
    def abandon(self) -> None:
        """Wait for the steps under way and forget their results."""
