"""Test cases, a call of each operation: operands on the host, which of them it writes, and the required accuracy.

Used by the sanitizer, and by tests that compare with the reference on the same device and repeat calls for equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Sizes:
    """The sizes of the operands: B, T, C, H, K (key/value heads), D, V, M."""

    batch: int = 2
    length: int = 24
    width: int = 40
    heads: int = 2
    kv_heads: int = 1
    head_size: int = 32
    vocabulary: int = 50
    mlp_width: int = 72

    @property
    def rows(self) -> int:
        """N = B·T."""
        return self.batch * self.length


SMALL = Sizes()
ODD = Sizes(batch=1, length=37, width=33, heads=3, kv_heads=3, head_size=19, vocabulary=101, mlp_width=35)
"""No size is a multiple of a vector length: tests the scalar paths of the kernels."""
LARGE = Sizes(batch=4, length=512, width=768, heads=12, kv_heads=4, head_size=64, vocabulary=50257, mlp_width=3072)
"""Several waves of blocks on a large GPU."""


@dataclass(frozen=True)
class Case:
    """A call of the operation `name`; operands by parameter name, in the order of the operation's signature."""

    name: str
    operands: dict[str, Array]
    written: tuple[str, ...] = ()
    """Operands that are overwritten."""
    updated: tuple[str, ...] = ()
    """Operands that are read and written."""
    options: dict[str, Any] = field(default_factory=dict)
    cuda_options: dict[str, Any] = field(default_factory=dict)
    """Options that only the CUDA implementation has: which of its kernels to use."""
    growth: float = 1.0
    """Allowed error in units of float32 rounding of the largest value."""
    roundings: float = 1.0
    """With bf16 operands: number of roundings to bf16 (half an ulp of the largest value) in the computation."""
    least: float = 0.0
    """Lower bound on the value that errors are relative to, for results with cancellation."""


class Draw:
    """Draws random operands of one dtype; deterministic."""

    def __init__(self, storage: str, sizes: Sizes, seed: int = 7) -> None:
        self.sizes, self.dtype = sizes, DTYPES[storage]
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape, np.float32).astype(self.dtype)

    def float32(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape, np.float32)

    def empty(self, *shape: int) -> Array:
        """An output operand filled with NaN, so that elements that are not written are detected."""
        return np.full(shape, np.nan, self.dtype)

    def statistics(self) -> Array:
        return np.full(self.sizes.rows, np.nan, np.float32)

    def tokens(self) -> Array:
        """Tokens (B, T) int32, of which some are frequent and some never occur."""
        draws = self.generator.zipf(1.3, (self.sizes.batch, self.sizes.length)) % self.sizes.vocabulary
        return draws.astype(np.int32)


class BoundCase:
    """A case with its operands on a device, which can be called repeatedly."""

    def __init__(self, case: Case, operation: Callable[..., Any], put: Callable[[Array], Any]) -> None:
        self.case = case
        self._operation = operation
        self._start = {name: put(x) for name, x in case.operands.items() if name in case.updated}
        self.arrays = {name: put(x) for name, x in case.operands.items()}
        self.value: Any = None
        """The return value of the last call."""

    def reset(self) -> None:
        """Restore updated operands, and fill written ones with the bytes 0xFF, which are NaN."""
        for name in self.case.updated:
            self.arrays[name][...] = self._start[name]
        for name in self.case.written:
            self.arrays[name].view("uint8")[...] = 0xFF

    def call(self) -> None:
        """Run the operation once."""
        self.value = self._operation(*self.arrays.values(), **self.case.options)

    def results(self) -> dict[str, Any]:
        """The written and updated arrays, and the return value unless it is None."""
        found = {name: self.arrays[name] for name in (*self.case.written, *self.case.updated)}
        return found if self.value is None else found | {"value": self.value}
