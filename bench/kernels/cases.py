"""One call of every operation: its operands on the host, which of them it writes, and how exact it must be.

The sanitizer runs them, the tests compare them with the reference on the same device and repeat them for equal bits.
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
    """How large the operands are. Letters as everywhere: B, T, C, H, K (key/value heads), D, V, M."""

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
"""No size is a multiple of a vector's: the kernels' scalar paths."""
LARGE = Sizes(batch=4, length=512, width=768, heads=12, kv_heads=4, head_size=64, vocabulary=50257, mlp_width=3072)
"""Several waves of blocks on a large card."""


@dataclass(frozen=True)
class Case:
    """One call of the operation `name`, by parameter names in the order of the operation's signature."""

    name: str
    operands: dict[str, Array]
    written: tuple[str, ...] = ()
    """Operands that are overwritten."""
    updated: tuple[str, ...] = ()
    """Operands that are read and written."""
    options: dict[str, Any] = field(default_factory=dict)
    cuda_options: dict[str, Any] = field(default_factory=dict)
    """Options that only the CUDA side has: which of its kernels to take."""
    growth: float = 1.0
    """Roundings of a float32 (of the largest value) that a result may be wrong by."""
    roundings: float = 1.0
    """With bf16 operands: roundings to bf16 (half an ulp of the largest value) on the way to a result."""
    least: float = 0.0
    """Errors are measured against at least this value: what was added and taken away again."""


class Draw:
    """Random operands of one dtype; the same numbers at every run."""

    def __init__(self, storage: str, sizes: Sizes, seed: int = 7) -> None:
        self.sizes, self.dtype = sizes, DTYPES[storage]
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape, np.float32).astype(self.dtype)

    def float32(self, *shape: int) -> Array:
        return self.generator.standard_normal(shape, np.float32)

    def empty(self, *shape: int) -> Array:
        """For what is written: not-a-number everywhere, so that an element left out shows."""
        return np.full(shape, np.nan, self.dtype)

    def statistics(self) -> Array:
        return np.full(self.sizes.rows, np.nan, np.float32)

    def tokens(self) -> Array:
        """(B, T) int32, drawn so that some are frequent and some never occur."""
        draws = self.generator.zipf(1.3, (self.sizes.batch, self.sizes.length)) % self.sizes.vocabulary
        return draws.astype(np.int32)


class Bound:
    """A case with its operands on a device, ready to be called any number of times."""

    def __init__(self, case: Case, operation: Callable[..., Any], put: Callable[[Array], Any]) -> None:
        self.case = case
        self._operation = operation
        self._start = {name: put(x) for name, x in case.operands.items() if name in case.updated}
        self.arrays = {name: put(x) for name, x in case.operands.items()}
        self.value: Any = None
        """What the last call returned."""

    def reset(self) -> None:
        """Put updated operands back; poison what is to be written with 0xFF, which is not a number."""
        for name in self.case.updated:
            self.arrays[name][...] = self._start[name]
        for name in self.case.written:
            self.arrays[name].view("uint8")[...] = 0xFF

    def call(self) -> None:
        """Run the operation once."""
        self.value = self._operation(*self.arrays.values(), **self.case.options)

    def results(self) -> dict[str, Any]:
        """Arrays (or a number) that the call gave."""
        found = {name: self.arrays[name] for name in (*self.case.written, *self.case.updated)}
        return found if self.value is None else found | {"value": self.value}
