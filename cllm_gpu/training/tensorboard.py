"""A run's figures as TensorBoard events, besides its metrics. Needs the extra `tensorboard` (tensorboardX)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cllm_gpu.training.reporter import Reporter
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

FOLDER = "tensorboard"
"""Of the event files, within the run's folder."""
STEP = {
    "loss": "loss/training",
    "smoothed_loss": "loss/training_smoothed",
    "rate": "optimizer/rate",
    "gradient_norm": "optimizer/gradient_norm",
    "update_norm": "optimizer/update_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "watts": "power/watts",
    "joules_per_token": "power/joules_per_token",
}
MEMORY = "memory/bytes"
"""What the backend holds of its device's memory after a step."""
EVALUATION = {
    "loss": "loss/validation",
    "perplexity": "validation/perplexity",
    "bits_per_byte": "validation/bits_per_byte",
    "accuracy": "validation/accuracy",
}
"""What is written, and under which name; of a step what its record has: MFU and power are a card's."""


def require_tensorboard() -> Any:
    """tensorboardX's SummaryWriter class. UserError, one line, where it is not installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard events need tensorboardX: pip install 'cllm-gpu[tensorboard]'") from None
    return SummaryWriter


class Events:
    """A `reporter.Reporter` that writes events and passes everything on to another."""

    def __init__(self, writer: Any, then: Reporter, memory_held: Callable[[], int | None]) -> None:
        """memory_held: see `Backend.memory_held`."""
        self._writer, self._then, self._memory_held = writer, then, memory_held

    def step(self, record: dict[str, Any]) -> None:
        """A step's figures."""
        self._write(STEP, record)
        self._write({"memory": MEMORY}, {"memory": self._memory_held(), "step": record["step"]})
        self._then.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        """An evaluation's figures."""
        self._write(EVALUATION, record)
        self._then.evaluation(record)

    def message(self, text: str) -> None:
        """Passed on."""
        self._then.message(text)

    def _write(self, names: dict[str, str], record: dict[str, Any]) -> None:
        for name, tag in names.items():
            value = record.get(name)
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(tag, value, record["step"])


@contextlib.contextmanager
def events(folder: Path, done: int, then: Reporter, memory_held: Callable[[], int | None]) -> Iterator[Events]:
    """Events into the run's `folder`, after `done` steps of it, complete on leaving. memory_held: as in `Events`.

    Events that an earlier process wrote after the checkpoint are purged.
    UserError where the folder cannot be written or tensorboardX is missing.
    """
    place = folder / FOLDER
    make = require_tensorboard()
    with clear_errors("write", place):
        # the suffix tells the files of two processes apart that begin in the same second
        writer = make(logdir=str(place), purge_step=done + 1 if done else None, filename_suffix=f".{done}")
    try:
        yield Events(writer, then, memory_held)
    finally:
        with clear_errors("write", place):
            writer.close()
