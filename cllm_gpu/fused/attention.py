"""Attention forward and backward: launches cuda/attention.cu. As `cllm_gpu.reference.attention`.

lse is float32 whatever the other arrays are. Operands may have any strides as long as their last axis is contiguous:
views into the fused qkv product are taken as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import (
    Launcher,
    Shapes,
    Variant,
    address_of,
    blocks_for,
    element_strides,
    storage_of,
)
from cllm_gpu.reference import attention as reference

THREADS = 128
MAXIMUM_HEAD_SIZE = 128
TERM_COUNT = 3  # numbers per head of the score terms: TERM_COUNT in attention.cuh


@dataclass(frozen=True)
class ScoreTerms:
    """Additive terms of the scores, from numbers of each token (cuda/attention.cuh says which):

    −α_h·‖(x, y)_i − (x, y)_j‖ − β_h·|z_i − z_j| + γ_h·[id_i = id_j]
    """

    coordinates: Any
    """(B, S, 4) float32: x, y, z and an id's bits."""
    weights: Any
    """(H, 3) float32: α, β, γ."""


@dataclass(frozen=True)
class Tiles:
    """Rows of a block and bytes of shared memory: the constants of the same meaning in attention_*.cuh."""

    forward_rows: int
    forward_shared: int
    query_rows: int
    query_shared: int
    key_rows: int
    key_shared: int


def tiles_of(storage: str, head_size: int, *, terms: bool) -> Tiles:
    """How the kernels of a dtype and head size cut their work."""
    if storage == "float32":
        row, weights = (head_size + 3) // 4 * 4 + 4, 40
        backward = 4 * (2 * 32 * row + 2 * 32 * row + 2 * 32 * weights)
        return Tiles(64, 4 * (64 * row + 2 * 32 * row + 64 * weights), 32, backward, 32, backward)
    row_bytes = 128 * (((head_size + 15) // 16 * 16 + 63) // 64)  # pages of 64 columns
    narrow = head_size <= 64
    forward_keys, query_keys = (64, 48) if narrow else (48, 32)
    if terms:
        forward_keys, query_keys = forward_keys - 16, query_keys - 16
    keys = 128 if narrow else 64
    key_queries = 32 if narrow else 64 if head_size <= 96 else 48
    return Tiles(
        forward_rows=128,
        forward_shared=row_bytes * (128 + 4 * forward_keys),
        query_rows=128,
        query_shared=row_bytes * (2 * 128 + 4 * query_keys),
        key_rows=keys,
        key_shared=row_bytes * (2 * keys + 4 * key_queries) + 16 * key_queries,
    )


def attention_forward(
    launcher: Launcher,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    causal: bool,
    scale: float,
    terms: ScoreTerms | None = None,
) -> None:
    """out (B, T, H, D) and lse (B, H, T) from q (B, T, H, D), k and v (B, S, K, D); K divides H; any strides."""
    call = _Call("attention_forward", q, k, v, causal=causal, scale=scale, terms=terms)
    call.check("out", out, "B T H D")
    call.check("lse", lse, "B H T")
    tiles = tiles_of(call.variant.storage, q.shape[3], terms=terms is not None)
    batch, length, heads, _ = q.shape
    launcher.launch(
        call.variant,
        "attention_forward",
        (blocks_for(length, tiles.forward_rows) * heads * batch,),
        THREADS,
        {"lse": lse, **call.arguments(q=q, k=k, v=v, out=out)},
        shared_bytes=tiles.forward_shared,
        strided=frozenset({"q", "k", "v", "out"}),
    )


def attention_backward(
    launcher: Launcher,
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    causal: bool,
    scale: float,
    terms: ScoreTerms | None = None,
    dweights: Any | None = None,
    accumulate_terms: bool = False,
) -> None:
    """dq, dk, dv (shapes of q, k, v; any strides) from dout (B, T, H, D) and what the forward took and gave.

    With `terms` also dweights (H, 3) float32, the gradients of α, β and γ, added to when `accumulate_terms`.
    """
    call = _Call("attention_backward", q, k, v, causal=causal, scale=scale, terms=terms)
    for name, array in (("dout", dout), ("out", out), ("dq", dq)):
        call.check(name, array, "B T H D")
    for name, array in (("dk", dk), ("dv", dv)):
        call.check(name, array, "B S K D")
    call.check("lse", lse, "B H T")
    delta = launcher.scratch("attention_delta", lse.shape, "float32")
    _delta(launcher, call, dout, out, delta)
    saved = {"lse": lse, "delta": delta}
    tiles = tiles_of(call.variant.storage, q.shape[3], terms=terms is not None)
    batch, positions, kv_heads, _ = k.shape
    launcher.launch(
        call.variant,
        "attention_backward_keys",
        (blocks_for(positions, tiles.key_rows) * kv_heads * batch,),
        THREADS,
        saved | call.arguments(dout=dout, q=q, k=k, v=v, dk=dk, dv=dv),
        shared_bytes=tiles.key_shared,
        strided=frozenset({"dout", "q", "k", "v", "dk", "dv"}),
    )
    batch, length, heads, _ = q.shape
    query_tiles = blocks_for(length, tiles.query_rows)
    partials = None
    if terms is not None:
        partials = launcher.scratch("score_terms", (batch, heads, query_tiles, TERM_COUNT), "float32")
    launcher.launch(
        call.variant,
        "attention_backward_queries",
        (query_tiles * heads * batch,),
        THREADS,
        saved | {"term_partials": partials} | call.arguments(dout=dout, q=q, k=k, v=v, dq=dq),
        shared_bytes=tiles.query_shared,
        strided=frozenset({"dout", "q", "k", "v", "dq"}),
    )
    if terms is not None:
        _finish_terms(launcher, call, partials, dweights, accumulate=accumulate_terms)


def attention_weights(launcher: Launcher, q: Any, k: Any, *, causal: bool, scale: float) -> Any:
    """The weights P (B, H, T, S) themselves, for inspection: O(T·S) memory, never used in training; float32."""
    wide_q, wide_k = (x.astype("float32", copy=False) for x in (q, k))
    return reference.attention_weights(launcher.xp, wide_q, wide_k, causal=causal, scale=scale)


class _Call:
    """What the kernels of one call share: the checked operands, their sizes and the variant."""

    def __init__(
        self, operation: str, q: Any, k: Any, v: Any, *, causal: bool, scale: float, terms: ScoreTerms | None
    ) -> None:
        self.check = Shapes(operation)
        _, length, heads, size = self.check("q", q, "B T H D")
        _, positions, kv_heads, _ = self.check("k", k, "B S K D")
        self.check("v", v, "B S K D")
        if not 1 <= size <= MAXIMUM_HEAD_SIZE:
            raise UserError(f"{operation}: argument q has head size {size}; at most {MAXIMUM_HEAD_SIZE} is supported")
        if heads % kv_heads:
            raise UserError(f"{operation}: argument k has {kv_heads} heads, which do not divide q's {heads}")
        if causal and positions < length:
            raise UserError(f"{operation}: argument k has {positions} positions, fewer than the {length} queries")
        if not (scale > 0.0):
            raise UserError(f"{operation}: argument scale is {scale}; it must be above 0")
        if positions == 0:
            raise UserError(f"{operation}: argument k has no position")
        self.terms = terms
        if terms is not None:
            self.check("terms.coordinates", terms.coordinates, "B S 4")
            if terms.coordinates.shape[2] != 4 or tuple(terms.weights.shape) != (heads, TERM_COUNT):
                shapes = f"{terms.coordinates.shape} and {terms.weights.shape}"
                raise UserError(f"{operation}: terms have shapes {shapes}; they must be (B, S, 4) and (H, 3)")
            if address_of(terms.coordinates) % 16:
                raise UserError(f"{operation}: terms.coordinates are not aligned to 16 bytes")
        defines = (("HEAD_SIZE", size), ("SCORE_TERMS", int(terms is not None)))
        self.variant = Variant("attention.cu", storage_of(operation, "q", q), defines=defines)
        self._operation = operation
        self._sizes = {
            "heads": heads,
            "kv_heads": kv_heads,
            "queries": length,
            "keys": positions,
            "causal": int(causal),
            "scale": scale,
        }

    def arguments(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, sizes and score terms, as a kernel takes them."""
        coordinates = None if self.terms is None else self.terms.coordinates
        weights = None if self.terms is None else self.terms.weights
        return self.operands(**operands) | {"coordinates": coordinates, "term_weights": weights} | self._sizes

    def operands(self, **operands: Any) -> dict[str, Any]:
        """Operands with their strides, and whether all of them can be read 16 bytes at a time."""
        wide = True
        strides: dict[str, int] = {}
        for name, array in operands.items():
            parts = element_strides(self._operation, name, array)
            strides |= {f"{name}_{axis}": part for axis, part in zip(("batch", "row", "head"), parts, strict=True)}
            width = 16 // array.dtype.itemsize
            aligned = address_of(array) % 16 == 0 and all(part % width == 0 for part in parts)
            wide = wide and aligned and array.shape[3] % width == 0
        return operands | strides | {"wide": int(wide)}


def _delta(launcher: Launcher, call: _Call, dout: Any, out: Any, delta: Any) -> None:
    """delta (B, H, T) = Σ_d dout·out."""
    batch, length, heads, _ = out.shape
    rows = batch * length * heads
    lanes = next(lanes for lanes in (4, 8, 16, 32) if 4 * lanes >= out.shape[3])  # DELTA_LANES in attention.cu
    sizes = {"rows": rows, "heads": heads, "queries": length}
    launcher.launch(
        call.variant,
        "attention_backward_delta",
        (blocks_for(rows * lanes, THREADS),),
        THREADS,
        {"delta": delta, **call.operands(dout=dout, out=out), **sizes},
        strided=frozenset({"dout", "out"}),
    )


def _finish_terms(launcher: Launcher, call: _Call, partials: Any, dweights: Any, *, accumulate: bool) -> None:
    batch, heads, tiles, _ = partials.shape
    if dweights is None or tuple(dweights.shape) != (heads, TERM_COUNT):
        raise UserError(f"attention_backward: argument dweights must have shape ({heads}, {TERM_COUNT})")
    launcher.launch(
        call.variant,
        "attention_terms_finish",
        (heads,),
        32,
        {
            "partials": partials,
            "gradients": dweights,
            "batch": batch,
            "heads": heads,
            "tiles": tiles,
            "accumulate": int(accumulate),
        },
    )
