"""The simulated device's stream: work is done as it is enqueued, and a capture is a tape (graphs.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cllm_gpu.simulator import graphs


class SimulatedStream:
    """As `cllm_gpu.device.Stream`."""

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat array of the device."""
        return graphs.empty(size, dtype)

    def array(self, host: Any) -> Any:
        """The same memory as an array of the device."""
        return graphs.array(host)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array."""
        return np.zeros(shape, dtype)

    def run(self, work: Callable[[], None]) -> None:
        """Do it."""
        work()

    def capture(self, work: Callable[[], None]) -> graphs.Graph:
        """Record it. CaptureError where it breaks the rules of a captured step."""
        return graphs.capture(work)

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Copy now."""
        array[...] = host

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Copy now."""
        host[...] = array

    def mark(self) -> Callable[[], None]:
        """Nothing is ever outstanding."""
        return lambda: None
