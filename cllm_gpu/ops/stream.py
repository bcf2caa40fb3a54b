"""What a device offers a training step that runs without the host: a stream, and operations that only enqueue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cllm_gpu.ops.specification import Operation


class Graph(Protocol):
    """A captured step."""

    def launch(self) -> None:
        """Enqueue all of it once more, with the arguments of its capture."""


class Event(Protocol):
    """An event recorded in a stream: complete once all that was enqueued before it is done."""

    def synchronize(self) -> None:
        """Block the host until the event is complete."""


class Stream(Protocol):
    """Work in order on one device: what is enqueued is done later, after what was enqueued before.

    Between two streams there is no order but what `wait_event` makes.
    """

    def another(self) -> Stream:
        """A new stream of the same device."""

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat array on the device."""

    def array(self, host: Any) -> Any:
        """A host array (or one that is there) on the device; waits."""

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array that the device can copy from and to by itself."""

    def run(self, work: Callable[[], None]) -> None:
        """Call `work`, whose launches go into this stream."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` would enqueue, as a graph. Raises UserError, in one line, where it cannot be captured."""

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Enqueue the copy of a pinned array to the device."""

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue the copy of an array of the device to another of its size and dtype; both contiguous."""

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Enqueue the copy of an array to a pinned one."""

    def record_event(self) -> Event:
        """A new event, recorded in this stream now."""

    def wait_event(self, event: Event) -> None:
        """Make the work enqueued from now on wait for an event, which may be of another stream."""


@dataclass(frozen=True)
class Device:
    """The stream of a backend and the operations of a step that leave their results on the device.

    Documented where defined, in `cllm_gpu.ops.cuda`: add_losses and decide_step in step_decision.py, the others, as
    `squared_norm_on_device` and so on, in the files of their names.
    """

    stream: Stream
    replays: str
    """What a captured step is called in one line, "captured as a CUDA graph"."""
    add_losses: Operation
    decide_step: Operation
    squared_norm: Operation
    adam_step: Operation
    sgd_step: Operation
