"""Parameters, and whatever has one number per parameter (gradients, moments), as one flat array with named views.

Matrices come first, as weight decay applies to them, and the lattice's scalars last, as they have a learning rate of
their own: so an optimizer's parameter groups are contiguous. Each view is padded to 128 bytes; the padding stays zero.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cllm_gpu.devices.buffers import ALIGNMENT
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.ops.precision import wide_dtype

INITIAL_DEVIATION = 0.02


@dataclass(frozen=True)
class ParameterSpec:
    """One named parameter: its shape and how it starts (normal with `deviation`, or at `start`)."""

    name: str
    shape: tuple[int, ...]
    deviation: float = 0.0
    start: float | Literal["lattice"] = 0.0
    """A constant, or "lattice": the points of the lattice, of as many tokens as the shape has rows."""
    lattice: bool = False
    """It belongs to the lattice: no weight decay, whatever its shape."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def decayed(self) -> bool:
        """Weight decay applies to matrices only."""
        return len(self.shape) > 1 and not self.lattice

    @property
    def scalars(self) -> bool:
        """These are scalars of the lattice, which have a learning rate of their own."""
        return self.lattice and self.start != "lattice"

    def starting_values(self) -> Any:
        """What a parameter without `deviation` starts as, of its shape (or one number for all of it)."""
        return lattice_points(self.shape[0]) if self.start == "lattice" else self.start


def parameter_specs(a: Architecture) -> list[ParameterSpec]:
    """All parameters of a model, GPT-2's initialisation (Radford et al. 2019): 0.02, residual projections /√(2L)."""
    residual = INITIAL_DEVIATION / math.sqrt(2 * a.layers)
    specs = [ParameterSpec("token_embedding", (a.vocabulary, a.width), INITIAL_DEVIATION)]
    if a.positions == "learned":
        specs.append(ParameterSpec("position_embedding", (a.context, a.width), INITIAL_DEVIATION))
    for layer in range(a.layers):
        block = f"blocks.{layer}"
        specs += _norm(f"{block}.attention_norm", a)
        specs += _linear(f"{block}.qkv", a.qkv_width, a.width, INITIAL_DEVIATION, a)
        specs += _linear(f"{block}.projection", a.width, a.width, residual, a)
        if a.lattice is not None and a.lattice.scalars:
            shape = (a.heads, len(a.lattice.scalars))
            specs.append(ParameterSpec(f"{block}.lattice_scalars", shape, start=a.lattice.start, lattice=True))
        specs += _norm(f"{block}.mlp_norm", a)
        specs += _linear(f"{block}.mlp_up", a.mlp_width, a.width, INITIAL_DEVIATION, a)
        specs += _linear(f"{block}.mlp_down", a.width, a.mlp_width, residual, a)
    specs += _norm("final_norm", a)
    if not a.tied_head:
        specs.append(ParameterSpec("head", (a.vocabulary, a.width), INITIAL_DEVIATION))
    if a.lattice is not None and a.lattice.learned_points:
        specs.append(ParameterSpec("lattice_points", (a.vocabulary, 3), start="lattice", lattice=True))
    return sorted(specs, key=lambda spec: (not spec.decayed, spec.scalars))


def _norm(name: str, a: Architecture) -> list[ParameterSpec]:
    specs = [ParameterSpec(f"{name}.weight", (a.width,), start=1.0)]
    return [*specs, ParameterSpec(f"{name}.bias", (a.width,))] if a.bias else specs


def _linear(name: str, rows: int, columns: int, deviation: float, a: Architecture) -> list[ParameterSpec]:
    specs = [ParameterSpec(f"{name}.weight", (rows, columns), deviation)]
    return [*specs, ParameterSpec(f"{name}.bias", (rows,))] if a.bias else specs


class Layout:
    """Where each named parameter lies in a flat array of `size` elements of `dtype`."""

    def __init__(self, specs: list[ParameterSpec], dtype: Any) -> None:
        self.dtype = np.dtype(dtype)
        self.specs = {spec.name: spec for spec in specs}
        self.offsets: dict[str, int] = {}
        self.count = sum(spec.size for spec in specs)
        """Parameters without padding."""
        step = max(1, ALIGNMENT // self.dtype.itemsize)
        self.size = 0
        for spec in specs:
            self.offsets[spec.name] = self.size
            self.size += -(-spec.size // step) * step

    @property
    def bytes(self) -> int:
        """Size of one flat array."""
        return self.size * self.dtype.itemsize

    def widened(self) -> Layout:
        """The same places in an array of at least float32: for moments and master weights."""
        wide = copy.copy(self)
        wide.dtype = wide_dtype(self.dtype)
        return wide

    def views(self, flat: Any) -> FlatParameters:
        """Named views of `flat` (size,)."""
        return FlatParameters(self, flat)


class FlatParameters(Mapping[str, Any]):
    """A flat array with named views: `parameters["final_norm.weight"]`; `parameters.flat` is all of it."""

    def __init__(self, layout: Layout, flat: Any) -> None:
        self.layout = layout
        self.flat = flat
        self._views = {
            name: flat[offset : offset + layout.specs[name].size].reshape(layout.specs[name].shape)
            for name, offset in layout.offsets.items()
        }

    def __getitem__(self, name: str) -> Any:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def initial_values(layout: Layout, seed: int) -> np.ndarray[Any, Any]:
    """The flat starting parameters, drawn on the host so that every backend starts from the same bits.

    Each parameter has a generator of its own, seeded by (seed, name): adding a layer changes no other's values.
    """
    flat = np.zeros(layout.size, dtype=layout.dtype)
    for name, spec in layout.specs.items():
        part = flat[layout.offsets[name] : layout.offsets[name] + spec.size]
        if spec.deviation:
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
            _fill_normal(generator, part, spec.deviation)
        else:
            part.reshape(spec.shape)[...] = spec.starting_values()
    return flat


def _fill_normal(generator: np.random.Generator, out: np.ndarray[Any, Any], deviation: float) -> None:
    """float32 draws whatever the dtype, so that float64 checks start from the same numbers; in bounded pieces."""
    for start in range(0, out.size, 1 << 20):
        part = out[start : start + (1 << 20)]
        part[...] = generator.standard_normal(part.size, dtype=np.float32) * np.float32(deviation)
