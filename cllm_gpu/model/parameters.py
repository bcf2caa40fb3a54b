"""Parameters, and whatever has one number per parameter (gradients, moments), as one flat array with named views.

Matrices come first, as weight decay applies to them, and the lattice's scalars last, as they have a learning rate of
their own: so an optimizer's parameter groups are contiguous. Each view is padded to 128 bytes; the padding stays zero.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cllm_gpu.devices.buffers import ALIGNMENT
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import ParameterSpec
from cllm_gpu.model.layers.tree import model_layers
from cllm_gpu.ops.precision import wide_dtype


def parameter_specs(a: Architecture) -> list[ParameterSpec]:
    """All parameters of a model, in the order in which they lie in the flat arrays."""
    specs = [spec for layer in model_layers(a).all for spec in layer.parameters()]
    return sorted(specs, key=lambda spec: (not spec.decayed, spec.scalars))


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

    def shapes(self, part: slice) -> tuple[tuple[slice, tuple[int, ...]], ...]:
        """(place, shape) of every parameter in `part` of a flat array, places counted from its start."""
        starts = {name: place - part.start for name, place in self.offsets.items() if part.start <= place < part.stop}
        specs = self.specs
        return tuple((slice(at, at + specs[name].size), specs[name].shape) for name, at in starts.items())

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
