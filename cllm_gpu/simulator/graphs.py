"""Simulated CUDA graphs: records the operations of a step on its arrays, and replays them.

`empty` allocates arrays of the simulated device. During a capture nothing is computed: launches, assignments to these
arrays, NumPy functions with `out=` and library calls are recorded on a tape with their arguments, pointers and numbers
alike, as cudaStreamBeginCapture does. The rules of capture are enforced: a step that allocates an array, reads one on
the host, or passes a kernel an array that is not on the device raises a `CaptureError` saying which. NumPy has no hook
for `np.asarray` of such an array: a decision based on the values read is frozen, and so is a number that Python changes
from step to step; a replay then differs from the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from cllm_gpu.simulator.errors import CaptureError
from cllm_gpu.utils.struct_argument import StructArgument

Work = Callable[[], None]
_open: Graph | None = None
"""The graph being captured, None outside a capture; one per process, since the simulator runs one launch at a time."""


class Graph:
    """A captured sequence of operations; the counterpart of cupy.cuda.Graph."""

    def __init__(self) -> None:
        self._tape: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __len__(self) -> int:
        return len(self._tape)

    def add(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Record a call."""
        self._tape.append((function, arguments, named))

    def launch(self) -> None:
        """Execute the recorded calls in order, with the recorded arguments."""
        for function, arguments, named in self._tape:
            function(*arguments, **named)


def capture(work: Work) -> Graph:
    """Record the operations of `work` without executing them. Raises CaptureError if it breaks a rule of capture."""
    global _open
    if _open is not None:
        raise CaptureError("a capture is under way already")
    _open = graph = Graph()
    try:
        work()
    finally:
        _open = None
    return graph


def empty(size: int | tuple[int, ...], dtype: Any = np.float64) -> DeviceArray:
    """An uninitialised array of the simulated device."""
    if _open is not None:
        _refuse(f"allocates an array of {size} {np.dtype(dtype).name}")
    return np.empty(size, dtype).view(DeviceArray)


def array(host: Any) -> DeviceArray:
    """An array of the simulated device that shares the memory of a host array."""
    if _open is not None:
        _refuse("brings a host array to the device")
    return np.asarray(host).view(DeviceArray)


def library_call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function that computes on the device without our kernels; during a capture, record the call instead."""
    plain = [_plain(x) for x in arguments], {name: _plain(x) for name, x in named.items()}
    if _open is None:
        return function(*plain[0], **plain[1])
    for value in (*arguments, *named.values()):
        _require_device(getattr(function, "__name__", "a library"), value)
    return _open.add(function, *plain[0], **plain[1])


def record_launch(kernel: Callable[..., Any], name: str, arguments: Sequence[Any], *launch: Any, **named: Any) -> bool:
    """Record a launch during a capture and return True; return False outside a capture."""
    if _open is None:
        return False
    for value in arguments:
        for array in _arrays_of(value):
            _require_device(f"kernel {name}", array)
    _open.add(kernel, *launch, **named)
    return True


def _arrays_of(argument: Any) -> list[Any]:
    """The arrays that an argument of a kernel points to, if it is a struct; else the argument itself."""
    return [pointer.array for pointer in argument.pointers] if isinstance(argument, StructArgument) else [argument]


def _require_device(user: str, value: Any) -> None:
    if isinstance(value, np.ndarray) and not isinstance(value, DeviceArray):
        _refuse(f"gives {user} an array of shape {value.shape} that is not the device's")


def _refuse(what: str) -> NoReturn:
    raise CaptureError(f"a captured step must not do this: it {what}")


def _owner(array: Any) -> Any:
    """The array that owns the memory of a view."""
    while isinstance(getattr(array, "base", None), np.ndarray):
        array = array.base
    return array


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, DeviceArray) else value


def _reading(name: str) -> Callable[..., Any]:
    method = getattr(np.ndarray, name)

    def read(self: DeviceArray, *arguments: Any, **named: Any) -> Any:
        if _open is not None:
            _refuse(f"reads an array of shape {self.shape} on the host ({name})")
        return method(_plain(self), *arguments, **named)

    return read


class DeviceArray(np.ndarray):
    """An array of the simulated device. Outside a capture, it behaves as a NumPy array; results are plain arrays."""

    def __array_finalize__(self, base: Any) -> None:
        if _open is not None and self.size and _owner(self) is not _owner(base):
            _refuse(f"allocates an array of shape {self.shape} {self.dtype.name}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        call = getattr(ufunc, method)
        arguments = [_plain(x) for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(_plain(x) for x in out)
        if _open is None:
            result = call(*arguments, **kwargs)
            return result if out is None or len(out) > 1 else out[0]
        if out is None:
            _refuse(f"allocates the result of {ufunc.__name__}")
        for value in (*inputs, *out):
            _require_device(ufunc.__name__, value)
        _open.add(call, *arguments, **kwargs)
        return out[0]

    def __array_function__(self, function: Any, types: Any, arguments: Any, named: Any) -> Any:
        if _open is not None:
            _refuse(f"calls numpy.{function.__name__}, which allocates or reads on the host")
        return super().__array_function__(function, types, arguments, named)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if _open is not None and not isinstance(found, np.ndarray):
            _refuse(f"reads an element of an array of shape {self.shape} on the host")
        return found

    def __iter__(self) -> Any:
        return iter([self[i] for i in range(len(self))])

    def __setitem__(self, index: Any, value: Any) -> None:
        if _open is None:
            _plain(self)[index] = _plain(value)
            return
        _require_device("an assignment", value)
        _open.add(_plain(self).__setitem__, index, _plain(value))

    __float__ = _reading("__float__")
    __int__ = _reading("__int__")
    __bool__ = _reading("__bool__")
    __index__ = _reading("__index__")
    item = _reading("item")
    tolist = _reading("tolist")
    tobytes = _reading("tobytes")
