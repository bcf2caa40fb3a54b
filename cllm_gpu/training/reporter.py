"""What a training run reports to: steps, evaluations and messages as they happen, and the result at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cllm_gpu.inference.evaluate import Evaluation


class Reporter(Protocol):
    """Receives the events of a run; records are plain data."""

    def step(self, record: dict[str, Any]) -> None:
        """A step is done."""

    def evaluation(self, record: dict[str, Any]) -> None:
        """The validation set was evaluated."""

    def message(self, text: str) -> None:
        """One line that a person should see at once."""


class Silent:
    """A reporter that discards everything."""

    def step(self, record: dict[str, Any]) -> None: ...

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    """Steps done."""
    interrupted: bool
    """Whether a signal or the end of `training.minutes` stopped it before it was done."""
    signal: int | None
    """Number of the signal that asked to stop; None if none did."""
    skipped: int
    """Steps whose gradient was refused."""
    evaluation: Evaluation | None
    """The last one."""
    checkpoint: Path | None
    """The last one written."""
