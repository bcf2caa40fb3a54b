"""Checks the arguments of a launch against the kernel's parameters, by the rules of CuPy and CUDA.

CuPy passes an array as a pointer to its first element, whatever its strides; a NumPy scalar as its own type; a Python
int as `long long`, a float as `double`; a struct as an array of one element. It does not check them. Here, an argument
that a GPU would misread raises a UserError that names the parameter, and a `StructArgument` shows what its pointers
point to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.struct_argument import StructArgument


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter, as described by the compiler."""

    name: str
    kind: str
    """NumPy's kind character, 'P' for a pointer, 'V' for anything else."""
    size: int
    pointee_kind: str
    pointee_size: int
    is_const: bool

    def __str__(self) -> str:
        if self.kind != "P":
            return f"{_c_name(self.kind, self.size)} {self.name}"
        return f"{'const ' if self.is_const else ''}{_c_name(self.pointee_kind, self.pointee_size)}* {self.name}"


def _c_name(kind: str, size: int) -> str:
    known = {"f4": "float", "f8": "double", "i4": "int", "u4": "unsigned", "i8": "long long", "b1": "bool"}
    known |= {"u8": "unsigned long long", "i1": "signed char", "u1": "unsigned char", "i2": "short", "V0": "void"}
    known |= {"u2": "unsigned short"}
    return known.get(f"{kind}{size}", f"{size}-byte struct")


@dataclass(frozen=True)
class Passed:
    """An array whose address a launch passes to its kernel."""

    name: str
    argument: int
    offset: int
    """Of the address in the argument's bytes: 0 unless the argument is a struct."""
    array: np.ndarray[Any, Any]


def arrays_in(parameters: Sequence[Parameter], arguments: Sequence[Any]) -> Iterator[Passed]:
    """Every array that a launch's arguments point to."""
    for i, (parameter, argument) in enumerate(zip(parameters, arguments, strict=True)):
        if isinstance(argument, StructArgument):
            for pointer in argument.pointers:
                yield Passed(pointer.name, i, pointer.offset, pointer.array)
        elif parameter.kind == "P" and isinstance(argument, np.ndarray):
            yield Passed(parameter.name, i, 0, argument)


def pack(kernel: str, parameters: Sequence[Parameter], arguments: Sequence[Any]) -> list[bytes]:
    """The bytes of each argument as the kernel expects them. Raises UserError, naming the parameter, on a mismatch."""
    if len(arguments) != len(parameters):
        listed = ", ".join(map(str, parameters))
        raise UserError(f"kernel {kernel} takes {len(parameters)} arguments ({listed}), {len(arguments)} given")
    return [_pack_one(kernel, p, a) for p, a in zip(parameters, arguments, strict=True)]


def _pack_one(kernel: str, parameter: Parameter, argument: Any) -> bytes:
    if isinstance(argument, StructArgument):
        return _pack_struct(kernel, parameter, argument)
    if isinstance(argument, np.ndarray) and argument.size == 1 and parameter.kind != "P":
        argument = argument.reshape(())[()]  # CuPy passes a NumPy array of size one by value
    if isinstance(argument, np.ndarray) or argument is None:
        return _pack_pointer(kernel, parameter, argument)
    if not isinstance(argument, np.generic):
        argument = _python_scalar(kernel, parameter, argument)
    if parameter.kind == "P" and argument.dtype.kind in "iu" and argument.dtype.itemsize == 8:
        return argument.tobytes()  # an address, as in CuPy; 0 is a null pointer
    if parameter.kind == "P":
        raise UserError(f"kernel {kernel}: {parameter} is a pointer, {_say(argument)} given; pass an array")
    if not _scalar_fits(parameter, argument):
        wanted = _c_name(parameter.kind, parameter.size)
        raise UserError(f"kernel {kernel}: parameter {parameter.name} is {wanted}, {_say(argument)} given")
    return argument.tobytes()[: parameter.size]


def _python_scalar(kernel: str, parameter: Parameter, argument: Any) -> np.generic:
    kinds: tuple[tuple[type, Any], ...]
    kinds = ((bool, np.bool_), (int, np.int64), (float, np.float64), (complex, np.complex128))
    for kind, numpy_type in kinds:
        if isinstance(argument, kind):
            try:
                scalar: Any = np.asarray(argument, numpy_type)[()]
                return scalar
            except OverflowError:
                raise UserError(f"kernel {kernel}: {argument} given for {parameter} passes 64 bits") from None
    raise UserError(f"kernel {kernel}: cannot pass {type(argument).__name__} for {parameter}")


def _say(argument: np.generic) -> str:
    return f"{type(argument).__name__}({argument})"


def _scalar_fits(parameter: Parameter, value: np.generic) -> bool:
    """Whether the kernel reads the intended value; of a wider integer it reads the low bytes, which must hold it."""
    kind, size = value.dtype.kind, value.dtype.itemsize
    if parameter.kind in "iu" and kind in "iu" and size > parameter.size:
        low, high = (-(2 ** (8 * parameter.size - 1)), 2 ** (8 * parameter.size))
        return low <= int(value) < high
    if parameter.kind in "iu" and kind in "iu":
        return size == parameter.size
    if parameter.kind == "V":
        return size == parameter.size
    return kind == parameter.kind and size == parameter.size


def _pack_struct(kernel: str, parameter: Parameter, argument: StructArgument) -> bytes:
    if parameter.kind != "V" or parameter.size != argument.nbytes:
        raise UserError(f"kernel {kernel}: a struct of {argument.nbytes} bytes given for {parameter}")
    return argument.tobytes()


def _pack_pointer(kernel: str, parameter: Parameter, array: np.ndarray[Any, Any] | None) -> bytes:
    if parameter.kind != "P":
        wanted = _c_name(parameter.kind, parameter.size)
        raise UserError(f"kernel {kernel}: parameter {parameter.name} is {wanted} by value, an array given")
    if array is None:
        return bytes(8)
    if not parameter.is_const and not array.flags.writeable:
        raise UserError(f"kernel {kernel}: the array given for {parameter} is read-only")
    if not _pointee_fits(parameter, array.dtype):
        raise UserError(f"kernel {kernel}: {parameter} was given an array of {array.dtype}")
    return bytes(ctypes.c_void_p(array.ctypes.data))


def _pointee_fits(parameter: Parameter, dtype: np.dtype[Any]) -> bool:
    size = parameter.pointee_size
    if size <= 1:  # void* and bytes take any array
        return True
    if parameter.pointee_kind == "V" or dtype.kind == "c" or dtype.fields:  # a struct, a vector type or bf16
        return size % dtype.itemsize == 0 or dtype.itemsize % size == 0
    return dtype.itemsize == size and (dtype.kind == parameter.pointee_kind or parameter.pointee_kind in "iu")
