"""The CUDA stream's order of calls, on a stand-in of CuPy: what it asks of a card that is not here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cllm_gpu.ops.cuda.stream import CudaStream
from cllm_gpu.utils.errors import UserError


class _CudaError(Exception):
    """As cupy.cuda.runtime.CUDARuntimeError."""


class _Stream:
    """As cupy.cuda.Stream: keeps what it is asked, and fails where it is told to."""

    def __init__(self, calls: list[str], fails: set[str], number: int) -> None:
        self._calls, self._fails, self.number = calls, fails, number

    def wait_event(self, event: _Event) -> None:
        assert event.recorded is not None
        self._call(f"{self.number} waits for {event.recorded.number}")

    def _call(self, name: str) -> None:
        self._calls.append(name)
        if name in self._fails:
            raise _CudaError(f"cudaErrorStreamCapture: {name}\nmore")

    def __enter__(self) -> None:
        self._call("enter")

    def __exit__(self, *error: object) -> None:
        self._call("leave")

    def begin_capture(self) -> None:
        self._call("begin")

    def end_capture(self) -> Any:
        self._call("end")
        return SimpleNamespace(launch=lambda stream: self._call(f"launch in {'ours' if stream is self else 'another'}"))


class _Event:
    """As cupy.cuda.Event."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.recorded: _Stream | None = None

    def record(self, stream: _Stream) -> None:
        self.recorded = stream
        self._calls.append(f"record in {stream.number}")

    def synchronize(self) -> None:
        assert self.recorded is not None
        self._calls.append(f"the host waits for {self.recorded.number}")


@pytest.fixture
def calls() -> list[str]:
    return []


def _made(calls: list[str], *fails: str) -> CudaStream:
    allocators: list[Callable[[int], Any]] = []

    @contextlib.contextmanager
    def using_allocator(allocator: Callable[[int], Any]) -> Iterator[None]:
        allocators.append(allocator)
        try:
            yield
        finally:
            allocators.pop()

    made: list[_Stream] = []

    def stream(*, non_blocking: bool) -> _Stream:
        assert non_blocking
        made.append(_Stream(calls, set(fails), len(made) + 1))
        return made[-1]

    def event(*, disable_timing: bool) -> _Event:
        assert disable_timing
        return _Event(calls)

    cuda = SimpleNamespace(
        Stream=stream, Event=event, using_allocator=using_allocator,
        runtime=SimpleNamespace(CUDARuntimeError=_CudaError),
    )  # fmt: skip
    empty = lambda size, dtype: allocators[-1](size * 4) if allocators else f"{size} {dtype}"  # noqa: E731
    return CudaStream(SimpleNamespace(cuda=cuda, empty=empty))


def test_a_capture_and_its_launches(calls: list[str]) -> None:
    stream = _made(calls)
    graph = stream.capture(lambda: calls.append("work"))
    graph.launch()
    graph.launch()
    assert calls == ["enter", "begin", "work", "end", "leave", "launch in ours", "launch in ours"]


def test_work_that_is_not_captured(calls: list[str]) -> None:
    stream = _made(calls)
    stream.run(lambda: calls.append("work"))
    stream.record_event().synchronize()
    assert calls == ["enter", "work", "leave", "record in 1", "the host waits for 1"]


def test_copies_go_into_their_stream_and_one_stream_waits_for_another(calls: list[str]) -> None:
    """By the calls that CuPy 14 has for it: ndarray.set, MemoryPointer.copy_from_device_async, ndarray.get."""
    stream = _made(calls)
    copies = stream.another()
    array = SimpleNamespace(
        set=lambda host, stream: calls.append(f"set {host} in {stream.number}"),
        get=lambda stream, out, blocking: calls.append(f"get {out} in {stream.number}, blocking {blocking}"),
        data="its memory", nbytes=12,
    )  # fmt: skip

    def copied(source: Any, size: int, stream: _Stream) -> None:
        calls.append(f"copy {size} bytes of {source} in {stream.number}")

    target = SimpleNamespace(data=SimpleNamespace(copy_from_device_async=copied))
    copies.upload("pinned", array)  # type: ignore[arg-type]
    stream.wait_event(copies.record_event())
    stream.copy(array, target)
    stream.download(array, "pinned")  # type: ignore[arg-type]
    assert calls == [
        "set pinned in 1", "record in 1", "2 waits for 1", "copy 12 bytes of its memory in 2",
        "get pinned in 2, blocking False",
    ]  # fmt: skip


def test_what_allocates_is_not_captured(calls: list[str]) -> None:
    stream = _made(calls)
    with pytest.raises(UserError, match=r"^the step allocates 12 bytes$"):
        stream.capture(lambda: stream.empty(3, "float32"))
    assert calls == ["enter", "begin", "end", "leave"], "the stream is not left capturing"
    assert stream.empty(3, "float32") == "3 float32"


def test_what_the_library_refuses_is_one_line(calls: list[str]) -> None:
    """As CuPy does for its cuBLAS: then ending the capture fails too."""
    stream = _made(calls, "end")

    def work() -> None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported\nat x")

    with pytest.raises(UserError) as caught:
        stream.capture(work)
    assert str(caught.value) == (
        "NotImplementedError: calling cuBLAS API during stream capture is currently unsupported"
    )
    assert calls == ["enter", "begin", "end", "leave"]


def test_a_capture_that_cuda_finds_invalid_at_its_end_is_one_line(calls: list[str]) -> None:
    with pytest.raises(UserError, match=r"^_CudaError: cudaErrorStreamCapture: end$"):
        _made(calls, "end").capture(lambda: None)
