"""A struct as an argument of a kernel that takes it by value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Pointer:
    """One array that a struct points to."""

    name: str
    offset: int
    """Of the pointer in the struct, in bytes."""
    array: Any


class StructArgument(np.ndarray):
    """The bytes of a struct as an array of one element, which CuPy passes by value, and so does the simulator.

    It holds the arrays that the struct points to: they stay alive, and the simulator knows what memory is theirs.
    """

    pointers: tuple[Pointer, ...]

    @staticmethod
    def of(packed: bytes, pointers: Iterable[Pointer]) -> StructArgument:
        """A struct of these bytes, and the array behind each of its pointers that is not null."""
        argument = np.frombuffer(packed, f"V{len(packed)}").view(StructArgument)
        argument.pointers = tuple(pointers)
        return argument
