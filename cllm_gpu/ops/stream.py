"""Interface of a device to asynchronous training steps: a stream, and operations that only enqueue work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cllm_gpu.ops.specification import Operation


class Graph(Protocol):
    """A captured step."""

    def launch(self) -> None:
        """Enqueue the captured work again, with the arguments it was captured with."""


class Event(Protocol):
    """An event recorded in a stream; complete once all work enqueued before it has finished."""

    def synchronize(self) -> None:
        """Block the host until the event is complete."""


class Stream(Protocol):
    """A queue of work on one device, executed asynchronously and in the order it was enqueued.

    Two streams are not ordered with each other except through `wait_event`.
    """

    def another(self) -> Stream:
        """A new stream on the same device."""

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat array on the device."""

    def array(self, host: Any) -> Any:
        """A device array with the contents of `host`, a host or device array; blocks until it is copied."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array in pinned (page-locked) memory, for asynchronous copies."""

    def run(self, work: Callable[[], None]) -> None:
        """Call `work` with its launches going into this stream."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """The work that `work` would enqueue, as a graph. Raises UserError, in one line, if it cannot be captured."""

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Enqueue a copy of a pinned host array to a device array."""

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue a copy between two contiguous device arrays of equal size and dtype."""

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Enqueue a copy of a device array to a pinned host array."""

    def record_event(self) -> Event:
        """Record a new event in this stream and return it."""

    def wait_event(self, event: Event) -> None:
        """Make all work enqueued from now on wait for an event of any stream."""


@dataclass(frozen=True)
class Device:
    """The stream of a backend and the operations that leave their results on the device.

    Documented where they are defined, in `cllm_gpu.ops.cuda`: add_losses and decide_step in step_decision.py, the
    others in the files of their names, as `squared_norm_on_device` and so on.
    """

    stream: Stream
    replays: str
    """How captured steps are described to the user, such as "captured as a CUDA graph"."""
    add_losses: Operation
    decide_step: Operation
    squared_norm: Operation
    adam_step: Operation
    sgd_step: Operation
