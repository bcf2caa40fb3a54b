"""What a layer is, and what it is given: the base class, the arrays it plans, and the pass of one batch.

A layer is made from the architecture alone and holds no array, so one description serves for parameters, memory plans
and diagnostics, and for any number of passes at once. Its arrays come with the `Pass`: parameters and gradients by
name, activations by the layer's name, constants of the device by the layer's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.model.recompute import Recompute
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.registry import Operations

if TYPE_CHECKING:
    from cllm_gpu.model.activations import Activations

INITIAL_DEVIATION = 0.02
"""Of weights at the start, as GPT-2's (Radford et al. 2019)."""


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
    looked_up: bool = False
    """Rows are read by index only, so no product of the forward has its elements as factors."""

    @property
    def size(self) -> int:
        """Elements."""
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
        """Initial values of a parameter without `deviation`: an array of its shape, or one number for all of it."""
        return lattice_points(self.shape[0]) if self.start == "lattice" else self.start


@dataclass(frozen=True)
class PlanRequest:
    """The batch that arrays are planned for."""

    batch: int
    length: int
    dtype: Any
    training: bool
    logit_chunks: LogitChunks
    gradient_dtype: Any
    """Of the parameters' gradients, which lie elsewhere."""

    @property
    def rows(self) -> int:
        """N = B·T."""
        return self.batch * self.length

    @property
    def wide(self) -> Any:
        """At least float32: of the few numbers per row that must not be rounded to less."""
        return wide_dtype(self.dtype)


@dataclass(frozen=True)
class Activation:
    """An array that a layer's forward leaves behind."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    recomputed: Recompute | None = "block"
    """In a block: the mildest level of recomputation at which its backward computes it again; None: always kept."""
    diagnosed: str | None = None
    """Its name in the diagnostics of a training step; None: it is not looked at."""


@dataclass(frozen=True)
class Temporary:
    """An array of a layer's backward, the same for all blocks."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    pool: str | None = None
    """Temporaries of one pool share their memory: no two are needed at once. None: memory of its own."""

    @property
    def bytes(self) -> int:
        """Size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Layer:
    """Base of the layers: a name, and no parameters and arrays unless a layer has some."""

    def __init__(self, role: str, block: int | None = None) -> None:
        self.role = role
        """Its name within a block, or in the model."""
        self.prefix = "" if block is None else f"blocks.{block}."
        """Of its parameters' names."""
        self.name = self.prefix + role
        self.aliases: dict[str, tuple[str, str]] = {}
        """Activations of its own that are another layer's: name → (layer, name there)."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Names of arrays that are None unless they are planned."""

    def parameters(self) -> list[ParameterSpec]:
        """Its parameters, in order."""
        return []

    def activations(self, request: PlanRequest) -> list[Activation]:
        """What its forward leaves behind."""
        return []

    def temporaries(self, request: PlanRequest) -> list[Temporary]:
        """What its backward writes besides the gradients of parameters; planned for training only."""
        return []

    def constants(self, backend: Backend, dtype: Any) -> dict[str, Any]:
        """Arrays of `dtype` on the device that never change, by name."""
        return {}

    def recompute(self, x: Pass) -> None:
        """Compute again what the level `pointwise` does not keep, from what it keeps."""


@dataclass
class Pass:
    """One batch on its way through the layers and back: what all of them read. Arrays as in `Transformer`."""

    ops: Operations
    parameters: Mapping[str, Any]
    constants: Mapping[str, Mapping[str, Any]]
    """By layer, then by name."""
    activations: Activations
    tokens: Any
    """(B, T) int32."""
    dropout: Dropout | None = None
    """The masks of this batch without their site; None for a pass without dropout."""
    cache: KeyValueCache | None = None
    """Keys and values of the preceding tokens; None if there are none."""
    gradients: Mapping[str, Any] = field(default_factory=dict)
    """Of the parameters; empty for a pass without backward."""
    accumulate: bool = False
    """Gradients of parameters are added to, not overwritten."""

    @property
    def first_position(self) -> int:
        """Position of the first token in its sequence."""
        return self.cache.length if self.cache else 0

    def site(self, number: int) -> Dropout | None:
        """The mask of one dropout of the model (0: embedding; then the branches in order); None without dropout."""
        return self.activations.dropout(self.dropout, number)

    def linear(self, name: str, inputs: Any, out: Any) -> None:
        """out (N, M) = inputs (N, K) · weightᵀ + bias, of the parameters called `name`."""
        p = self.parameters
        self.ops.linear_forward(inputs, p[f"{name}.weight"], p.get(f"{name}.bias"), out)

    def linear_backward(self, name: str, dout: Any, inputs: Any, dinputs: Any) -> None:
        """dinputs (N, K) and the gradients of the parameters called `name` from dout (N, M)."""
        g, weight = self.gradients, f"{name}.weight"
        self.ops.linear_backward(
            dout, inputs, self.parameters[weight], dinputs, g[weight], g.get(f"{name}.bias"), accumulate=self.accumulate
        )


def linear_specs(name: str, rows: int, columns: int, deviation: float, *, bias: bool) -> list[ParameterSpec]:
    """Weight (rows, columns) and, where there are biases, bias (rows,) of an affine map."""
    specs = [ParameterSpec(f"{name}.weight", (rows, columns), deviation)]
    return [*specs, ParameterSpec(f"{name}.bias", (rows,))] if bias else specs


def branch_deviation(layers: int) -> float:
    """Of the weights that write to the residual stream, at the start: 0.02 / √(2L)."""
    return INITIAL_DEVIATION / math.sqrt(2 * layers)
