"""The simulated device's streams, each at one extreme of what a card may do, and a capture as a tape (graphs.py).

A card does what is in two streams in any order that their waits for each other allow. A stream here does its work
either at once, as it is enqueued, or as late as it may: when someone waits for it. Of two streams, one of either kind,
a wait that is missing therefore gives other numbers: what reads a late stream's result finds it not there yet, and what
writes to memory that a late stream still has to read is too early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm_gpu.simulator import graphs

Task = Callable[[], None]


class SimulatedStream:
    """As `cllm_gpu.ops.stream.Stream`. late: work is done when someone waits for it, otherwise as it is enqueued."""

    def __init__(self, *, late: bool = False) -> None:
        self._late = late
        self._waiting: deque[Task] = deque()
        self._done = 0  # tasks, of all that were ever enqueued

    def another(self) -> SimulatedStream:
        """A stream of the other kind."""
        return SimulatedStream(late=not self._late)

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat array of the device."""
        return graphs.empty(size, dtype)

    def array(self, host: Any) -> Any:
        """The same memory as an array of the device."""
        return graphs.array(host)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array."""
        return np.zeros(shape, dtype)

    def run(self, work: Task) -> None:
        """Do it, after all that waits: its host side (allocations, compiling) is done at once on a card too."""
        self._advance(self._done + len(self._waiting))
        work()

    def capture(self, work: Task) -> _SimulatedGraph:
        """Record it. CaptureError where it breaks the rules of a captured step."""
        return _SimulatedGraph(graphs.capture(work), self)

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Enqueue the copy."""
        self.enqueue(lambda: array.__setitem__(..., host))

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue the copy."""
        self.enqueue(lambda: target.__setitem__(..., source))

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Enqueue the copy."""
        self.enqueue(lambda: host.__setitem__(..., array))

    def record_event(self) -> _SimulatedEvent:
        """A new event, recorded in this stream now."""
        return _SimulatedEvent(self, self._done + len(self._waiting))

    def wait_event(self, event: Any) -> None:
        """Make the work enqueued from now on wait for an event of a stream of this kind."""
        self.enqueue(event.synchronize)

    def enqueue(self, task: Task) -> None:
        """Do the task, at once or when someone waits for it."""
        self._waiting.append(task)
        if not self._late:
            self._advance(self._done + 1)

    def _advance(self, count: int) -> None:
        """Do what is left of the first `count` tasks."""
        while self._done < count:
            self._done += 1
            self._waiting.popleft()()


class _SimulatedEvent:
    """A number of tasks of a stream."""

    def __init__(self, stream: SimulatedStream, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        """Have them done."""
        self._stream._advance(self._count)


class _SimulatedGraph:
    """A captured tape and the stream it is launched into."""

    def __init__(self, graph: graphs.Graph, stream: SimulatedStream) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        """Enqueue it."""
        self._stream.enqueue(self._graph.launch)
