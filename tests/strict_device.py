"""A device without a device: an array module like CuPy's whose arrays refuse to be mixed with NumPy's.

CuPy raises where a host array and a device array meet, and where a device array is silently converted. Code that is
only ever run on NumPy does not show such places; run on these arrays it raises TypeError there.
"""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]


class DeviceArray:
    """An array that only the functions of `StrictModule` and its own operators accept."""

    __array_ufunc__ = None  # NumPy's operators give way to ours
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: Host) -> None:
        self.host = host

    def __array__(self, *_: Any, **__: Any) -> Host:
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # NumPy looks for other ways to the data
            raise AttributeError(name)
        return on_device(getattr(self.host, name))

    def __getitem__(self, index: Any) -> Any:
        return wrapped(self.host[to_numpy(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.host[to_numpy(index)] = to_numpy(value)

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Any:
        return (wrapped(item) for item in self.host)

    def __float__(self) -> float:
        return float(self.host)

    def __int__(self) -> int:
        return int(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __neg__(self) -> Any:
        return wrapped(-self.host)


def _operator(name: str) -> Any:
    function = getattr(operator, name)

    def forward(self: DeviceArray, other: Any) -> Any:
        return wrapped(function(self.host, to_numpy(other)))

    def reflected(self: DeviceArray, other: Any) -> Any:
        return wrapped(function(to_numpy(other), self.host))

    def in_place(self: DeviceArray, other: Any) -> Any:
        self.host[...] = function(self.host, to_numpy(other))
        return self

    return forward, reflected, in_place


for _name in ("add", "sub", "mul", "truediv", "matmul", "xor", "and_", "or_", "rshift", "lshift", "mod", "floordiv"):
    _plain = _name.rstrip("_")
    for _prefix, _method in zip(("", "r", "i"), _operator(_name), strict=True):
        setattr(DeviceArray, f"__{_prefix}{_plain}__", _method)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(DeviceArray, f"__{_name}__", _operator(_name)[0])


def to_numpy(value: Any) -> Any:
    """Device arrays unpacked; a NumPy array of any size raises."""
    if isinstance(value, DeviceArray):
        return value.host
    if isinstance(value, np.ndarray):
        raise TypeError("a NumPy array where a device array is needed")
    if isinstance(value, tuple | list):
        return type(value)(to_numpy(item) for item in value)
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    return value


def wrapped(value: Any) -> Any:
    """Results on the device; CuPy's reductions give arrays without dimensions, not scalars."""
    if isinstance(value, np.ndarray | np.generic):
        return DeviceArray(np.asarray(value))
    if isinstance(value, tuple):
        return tuple(wrapped(item) for item in value)
    return value


def on_device(member: Any) -> Any:
    """An attribute or method of an array, or a function of the module, as the device has it."""
    if isinstance(member, type) or not callable(member):
        return member if isinstance(member, np.dtype | type | tuple) else wrapped(member)

    def call(*arguments: Any, **named: Any) -> Any:
        return wrapped(member(*to_numpy(arguments), **to_numpy(named)))

    return call


class StrictModule(ModuleType):
    """Stands for CuPy: every function of NumPy, on device arrays."""

    def __init__(self) -> None:
        super().__init__("strict_device")

    def __getattr__(self, name: str) -> Any:
        member = getattr(np, name)
        return on_device(member) if hasattr(member, "reduceat") is False else _ufunc(member)

    def asarray(self, x: Any, dtype: Any = None) -> DeviceArray:
        """A host or device array, a list or a number on the device."""
        return DeviceArray(np.array(x.host if isinstance(x, DeviceArray) else x, dtype=dtype))

    def asnumpy(self, x: DeviceArray) -> Host:
        """A copy on the host."""
        return x.host.copy()


def _ufunc(function: np.ufunc) -> Any:
    call = on_device(function)
    call.reduceat = on_device(function.reduceat)
    return call
