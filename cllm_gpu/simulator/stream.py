"""Streams of the simulated device, each at one extreme of a GPU's possible schedules, and capture of a tape
(graphs.py).

A GPU may execute the work of two streams in any order that their events allow. A simulated stream executes work either
immediately, when it is enqueued, or as late as possible, when something waits for it. With one stream of each kind, a
missing wait therefore changes the results: a reader of the late stream's results finds them not yet written, and a
writer to memory that the late stream has yet to read writes too early.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cllm_gpu.simulator import graphs

Task = Callable[[], None]


class SimulatedStream:
    """Implements `cllm_gpu.ops.stream.Stream`. late: execute work when something waits for it, not when enqueued."""

    def __init__(self, *, late: bool = False) -> None:
        self._late = late
        self._waiting: deque[Task] = deque()
        self._done = 0  # number of tasks executed so far

    def another(self) -> SimulatedStream:
        """A new stream of the other kind."""
        return SimulatedStream(late=not self._late)

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat device array."""
        return graphs.empty(size, dtype)

    def array(self, host: Any) -> Any:
        """A device array that shares the memory of a host array."""
        return graphs.array(host)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array (zeros)."""
        return np.zeros(shape, dtype)

    def run(self, work: Task) -> None:
        """Execute `work` after all enqueued tasks. Immediate, because on a GPU its host side (allocation, compilation)
        is too."""
        self._advance(self._done + len(self._waiting))
        work()

    def capture(self, work: Task) -> _SimulatedGraph:
        """Record `work` as a graph. Raises CaptureError if it breaks the rules of a captured step."""
        return _SimulatedGraph(graphs.capture(work), self)

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Enqueue a copy from the host."""
        self.enqueue(lambda: array.__setitem__(..., host))

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue a copy on the device."""
        self.enqueue(lambda: target.__setitem__(..., source))

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Enqueue a copy to the host."""
        self.enqueue(lambda: host.__setitem__(..., array))

    def record_event(self) -> _SimulatedEvent:
        """Record a new event in this stream."""
        return _SimulatedEvent(self, self._done + len(self._waiting))

    def wait_event(self, event: Any) -> None:
        """Make subsequently enqueued work wait for an event of a simulated stream."""
        self.enqueue(event.synchronize)

    def enqueue(self, task: Task) -> None:
        """Enqueue a task; a stream that is not late executes it immediately."""
        self._waiting.append(task)
        if not self._late:
            self._advance(self._done + 1)

    def _advance(self, count: int) -> None:
        """Execute the first `count` tasks, as far as they have not been executed."""
        while self._done < count:
            self._done += 1
            self._waiting.popleft()()


class _SimulatedEvent:
    """An event: the first `count` tasks of a stream."""

    def __init__(self, stream: SimulatedStream, count: int) -> None:
        self._stream, self._count = stream, count

    def synchronize(self) -> None:
        """Execute the tasks before the event."""
        self._stream._advance(self._count)


class _SimulatedGraph:
    """A captured graph and the stream it is launched on."""

    def __init__(self, graph: graphs.Graph, stream: SimulatedStream) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        """Enqueue the graph."""
        self._stream.enqueue(self._graph.launch)
