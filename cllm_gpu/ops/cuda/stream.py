"""CUDA streams through CuPy, and stream capture as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from cllm_gpu.utils.errors import UserError


class CudaStream:
    """Implements `cllm_gpu.ops.stream.Stream` by a non-blocking stream, not synchronized with the default stream."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy

    def another(self) -> CudaStream:
        """A new stream on the same GPU."""
        return CudaStream(self._cupy)

    @functools.cached_property
    def _stream(self) -> Any:
        return self._cupy.cuda.Stream(non_blocking=True)

    def empty(self, size: int, dtype: Any) -> Any:
        """An uninitialised flat array on the GPU."""
        return self._cupy.empty(size, dtype=dtype)

    def array(self, host: Any) -> Any:
        """A host array on the GPU."""
        return self._cupy.asarray(host)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """A host array of zeros in pinned memory."""
        array: np.ndarray[Any, Any] = importlib.import_module("cupyx").empty_pinned(shape, dtype=dtype)
        array[...] = 0
        return array

    def run(self, work: Callable[[], None]) -> None:
        """Enqueue `work`."""
        with self._stream:
            work()

    def capture(self, work: Callable[[], None]) -> _CudaGraph:
        """Capture `work` as a CUDA graph. Raises UserError if CUDA or CuPy cannot capture it or it allocates memory."""
        cupy, stream = self._cupy, self._stream
        with stream, cupy.cuda.using_allocator(_refuse_memory):
            stream.begin_capture()
            try:
                work()
            except Exception as error:
                self._discard()
                raise UserError(_one_line(error)) from error
            try:
                return _CudaGraph(stream.end_capture(), stream)
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise UserError(_one_line(error)) from error

    def _discard(self) -> None:
        """End a failed capture, ignoring the error that CUDA may report again."""
        with contextlib.suppress(self._cupy.cuda.runtime.CUDARuntimeError):
            self._stream.end_capture()

    def upload(self, host: np.ndarray[Any, Any], array: Any) -> None:
        """Enqueue a copy of a pinned host array to a GPU array."""
        array.set(host, stream=self._stream)

    def download(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Enqueue a copy of a GPU array to a pinned host array."""
        array.get(stream=self._stream, out=host, blocking=False)

    def copy(self, source: Any, target: Any) -> None:
        """Enqueue a copy between two contiguous GPU arrays of equal size and dtype."""
        target.data.copy_from_device_async(source.data, source.nbytes, stream=self._stream)

    def record_event(self) -> Any:
        """Record a new cupy.cuda.Event in this stream and return it."""
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return event

    def wait_event(self, event: Any) -> None:
        """Make all work enqueued from now on wait for a cupy.cuda.Event."""
        self._stream.wait_event(event)


class _CudaGraph:
    """A captured graph, launched into the stream it was captured from."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        """Enqueue the graph."""
        self._graph.launch(stream=self._stream)


def _refuse_memory(size: int) -> NoReturn:
    raise UserError(f"the step allocates {size} bytes")


def _one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
