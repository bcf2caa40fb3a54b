"""The arrays a model needs for one (B, T): planned, sized, then allocated once and never moved."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.devices.buffers import Plan
from cllm_gpu.devices.logit_chunks import ON_HOST, LogitChunks
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.recompute import Recompute, is_kept
from cllm_gpu.ops.precision import is_narrow, wide_dtype
from cllm_gpu.ops.reference.dropout import Dropout

STATISTICS = ("attention_mean", "attention_rstd", "lse", "mlp_mean", "mlp_rstd")
"""The few numbers per row: never below float32."""


@dataclasses.dataclass(frozen=True)
class LayerArrays:
    """What one block's forward leaves for its backward, its own or shared with the others. N = B·T rows."""

    attention_residual: Any  # (N, C) residual stream before the attention's layer norm
    attention_normed: Any  # (N, C)
    attention_statistics: tuple[Any, Any]  # mean and 1/deviation, (N,) each
    qkv: Any  # (N, C + 2·K·D)
    attended: Any  # (N, C)
    lse: Any  # (B, H, T)
    mlp_residual: Any  # (N, C)
    mlp_normed: Any  # (N, C)
    mlp_statistics: tuple[Any, Any]
    hidden: Any  # (N, M) before GELU, the bias included
    activated: Any  # (N, M) after


@dataclasses.dataclass(frozen=True)
class LatticeInputs:
    """What crystalline attention knows of the tokens of one batch."""

    tokens: Any  # (B, S), those in the cache included
    points: Any  # (B, S, 3), or None where no term sees them


def workspace_plan(
    a: Architecture,
    batch: int,
    length: int,
    dtype: Any,
    *,
    training: bool,
    recompute: Recompute = "none",
    logit_chunks: LogitChunks = ON_HOST,
    gradient_dtype: Any | None = None,
) -> Plan:
    """Every array of a workspace. Without `training` the layers share one set, and no gradient is planned.

    gradient_dtype: of the parameters' gradients, which lie elsewhere; None: `dtype`.
    """
    rows = batch * length
    plan = Plan()
    plan.add("embedding", (rows, a.width), dtype)
    _plan_layers(plan, a, batch, length, dtype, recompute if training else None)
    plan.add("branch", (rows, a.width), dtype)
    plan.add("final_residual", (rows, a.width), dtype)
    plan.add("final_normed", (rows, a.width), dtype)
    plan.add("final_mean", (rows,), wide_dtype(dtype))
    plan.add("final_rstd", (rows,), wide_dtype(dtype))
    plan.add("losses", (rows,), wide_dtype(dtype))
    if a.lattice is not None and a.lattice.uses_points:
        _plan_points(plan, a, rows, dtype, training=training)
    chunk = logit_chunks.at_once(rows, a.vocabulary, dtype, training=training)
    plan.add("logits", (chunk, a.vocabulary), dtype)
    if training:
        if chunk < rows and is_narrow(gradient_dtype or dtype):
            plan.add("dhead", (a.vocabulary, a.width), wide_dtype(dtype))
        plan.add("dresidual", (rows, a.width), dtype)
        plan.add("dnormed", (rows, a.width), dtype)
        plan.add("dattended", (rows, a.width), dtype)
        plan.add("dhidden", (rows, max(a.mlp_width, a.qkv_width)), dtype)  # also dqkv: never needed at once
    return plan


def _plan_points(plan: Plan, a: Architecture, rows: int, dtype: Any, *, training: bool) -> None:
    """The lattice points of the tokens, never below float32: their differences would be of 8 bits. Learned ones too."""
    assert a.lattice is not None
    wide, held_apart = wide_dtype(dtype), a.lattice.learned_points and is_narrow(dtype)
    plan.add("points", (rows, 3), wide)
    if held_apart:
        plan.add("point_table", (a.vocabulary, 3), wide)
    if training and a.lattice.learned_points:
        plan.add("dpoints", (rows, 3), wide)
        if held_apart:
            plan.add("dpoint_table", (a.vocabulary, 3), wide)


def _plan_layers(plan: Plan, a: Architecture, batch: int, length: int, dtype: Any, recompute: Recompute | None) -> None:
    """What every block keeps, then what all blocks share; with None they share everything."""
    shapes = _layer_shapes(a, batch, length)
    kinds = {name: wide_dtype(dtype) if name in STATISTICS else dtype for name in shapes}
    kept = [name for name in shapes if recompute is not None and is_kept(recompute, name)]
    for layer in range(a.layers):
        for name in kept:
            if layer > 0 or name != "attention_residual":  # the first block's residual stream is the embedding itself
                plan.add(f"layer{layer}.{name}", shapes[name], kinds[name])
    for name in shapes:
        if name not in kept:
            plan.add(f"shared.{name}", shapes[name], kinds[name])


def _layer_shapes(a: Architecture, batch: int, length: int) -> dict[str, tuple[int, ...]]:
    rows = batch * length
    return {
        "attention_residual": (rows, a.width),
        "attention_normed": (rows, a.width),
        "attention_mean": (rows,),
        "attention_rstd": (rows,),
        "qkv": (rows, a.qkv_width),
        "attended": (rows, a.width),
        "lse": (batch, a.heads, length),
        "mlp_residual": (rows, a.width),
        "mlp_normed": (rows, a.width),
        "mlp_mean": (rows,),
        "mlp_rstd": (rows,),
        "hidden": (rows, a.mlp_width),
        "activated": (rows, a.mlp_width),
    }


def batch_dropout(a: Architecture, *, seed: int, step: Any, first: int) -> Dropout | None:
    """The masks of a training batch from its sequence `first` on, to be given a site; None for a model without dropout.

    step: as in `Dropout`.
    """
    if a.dropout == 0.0:
        return None
    return Dropout(a.dropout, seed, step, site=0, first_element=first * a.context * a.width)


class Workspace:
    """Arrays for one batch of B sequences of T tokens; `first_row` is where it starts in a batch split over threads."""

    def __init__(
        self,
        architecture: Architecture,
        backend: Backend,
        batch: int,
        length: int,
        dtype: Any,
        *,
        training: bool,
        recompute: Recompute = "none",
        first_row: int = 0,
        gradient_dtype: Any | None = None,
    ) -> None:
        self.architecture, self.batch, self.length, self.recompute = architecture, batch, length, recompute
        self._first_element = first_row * architecture.width
        plan = workspace_plan(
            architecture, batch, length, dtype,
            training=training, recompute=recompute, logit_chunks=backend.logit_chunks, gradient_dtype=gradient_dtype,
        )  # fmt: skip
        views = plan.allocate(backend.empty_bytes)
        self.bytes = plan.bytes
        self.embedding = views["embedding"]
        self.branch = views["branch"]
        self.final_residual = views["final_residual"]
        self.final_normed = views["final_normed"]
        self.final_statistics = (views["final_mean"], views["final_rstd"])
        self.losses = views["losses"]
        self.logits = views["logits"]
        self.dhead: Any = views.get("dhead")  # (V, C) where chunks of logits would add to narrower gradients
        self.points: Any = views.get("points")  # (N, 3) lattice points of the tokens, where a term sees them
        self.dpoints: Any = views.get("dpoints")
        self.point_table: Any = views.get("point_table")  # (V, 3) learned points widened, where they are narrower
        self.dpoint_table: Any = views.get("dpoint_table")
        self.lattice: LatticeInputs | None = None
        """What the last forward told its layers of the tokens."""
        self.token_order: Any = None
        """(N,) int64, the positions sorted by their token, where who gives the tokens has sorted them already."""
        self.layers = [_layer_arrays(views, layer) for layer in range(architecture.layers)]
        if training:
            self._allocate_gradients(views)

    def _allocate_gradients(self, views: dict[str, Any]) -> None:
        a, rows = self.architecture, self.batch * self.length
        self.dresidual = views["dresidual"]
        self.dnormed = views["dnormed"]
        self.dattended = views["dattended"]
        shared = views["dhidden"].reshape(-1)
        self.dhidden = shared[: rows * a.mlp_width].reshape(rows, a.mlp_width)
        self.dqkv = shared[: rows * a.qkv_width].reshape(rows, a.qkv_width)

    def block_input(self, layer: int) -> Any:
        """Residual stream (N, C) at a block's beginning; the first block's is the embedding."""
        return self.embedding if layer == 0 else self.layers[layer].attention_residual

    def heads(self, x: Any) -> Any:
        """x (N, H·D) as (B, T, H, D)."""
        return x.reshape(self.batch, self.length, -1, self.architecture.head_size)

    def split_heads(self, qkv: Any) -> tuple[Any, Any, Any]:
        """Views of qkv (N, C + 2·K·D): queries (B, T, H, D), keys and values (B, T, K, D)."""
        a = self.architecture
        heads = self.heads(qkv)
        return (
            heads[:, :, : a.heads],
            heads[:, :, a.heads : a.heads + a.kv_heads],
            heads[:, :, a.heads + a.kv_heads :],
        )

    def dropout(self, dropout: Dropout | None, site: int) -> Dropout | None:
        """The mask of one dropout of the model (0: embedding; then the branches in order) for these rows."""
        if dropout is None:
            return None
        return dataclasses.replace(dropout, site=site, first_element=dropout.first_element + self._first_element)


def _layer_arrays(views: dict[str, Any], layer: int) -> LayerArrays:
    def view(name: str) -> Any:
        return views.get(f"layer{layer}.{name}", views.get(f"shared.{name}"))

    return LayerArrays(
        attention_residual=view("attention_residual"),
        attention_normed=view("attention_normed"),
        attention_statistics=(view("attention_mean"), view("attention_rstd")),
        qkv=view("qkv"),
        attended=view("attended"),
        lse=view("lse"),
        mlp_residual=view("mlp_residual"),
        mlp_normed=view("mlp_normed"),
        mlp_statistics=(view("mlp_mean"), view("mlp_rstd")),
        hidden=view("hidden"),
        activated=view("activated"),
    )


class KeyValueCache:
    """Keys and values of every layer for up to `capacity` positions; `length` positions are filled.

    With crystalline attention also the tokens at those positions, and their lattice points where a term sees them.
    """

    def __init__(self, architecture: Architecture, backend: Backend, batch: int, capacity: int, dtype: Any) -> None:
        shape = (architecture.layers, batch, capacity, architecture.kv_heads, architecture.head_size)
        self._keys = backend.xp.empty(shape, dtype)
        self._values = backend.xp.empty(shape, dtype)
        lattice = architecture.lattice
        self._tokens = None if lattice is None else backend.xp.empty((batch, capacity), np.int32)
        has_points = lattice is not None and lattice.uses_points
        self._points = backend.xp.empty((batch, capacity, 3), wide_dtype(dtype)) if has_points else None
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, k: Any, v: Any) -> tuple[Any, Any]:
        """Append k and v (B, T, K, D) of one layer; all keys and values so far, (B, S, K, D)."""
        end = self.length + k.shape[1]
        self._keys[layer, :, self.length : end] = k
        self._values[layer, :, self.length : end] = v
        return self._keys[layer, :, :end], self._values[layer, :, :end]

    def extend_lattice(self, tokens: Any, points: Any | None) -> tuple[Any, Any | None]:
        """Append tokens (B, T) and points (B, T, 3); all so far, (B, S) and (B, S, 3)."""
        end = self.length + tokens.shape[1]
        assert self._tokens is not None
        self._tokens[:, self.length : end] = tokens
        if self._points is None:
            return self._tokens[:, :end], None
        self._points[:, self.length : end] = points
        return self._tokens[:, :end], self._points[:, :end]
