"""The score bias of the lattice as arguments of the attention kernels (cuda/score_terms.cuh).

As `cllm_gpu.ops.reference.score_bias`. The attention kernels compute the bias; this module checks its arrays, selects
the variant for the terms in use, and finishes the gradients: the sums over blocks and heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, element_strides
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreBias, ScoreBiasGradients
from cllm_gpu.utils.errors import UserError

STRIDED = frozenset({"terms.points"})
"""Arguments that may be views with strides of their own."""
PAD_BEFORE, PAD_AFTER = 8, 127
"""Padding around the tokens that the kernels compare; must match the constants in score_terms.cuh."""
_THREADS = 128


def score_bias_defines(score_bias: ScoreBias | None, *, point_gradients: bool = False) -> tuple[tuple[str, int], ...]:
    """Macros that compile an attention source with the terms in use; () if there is no score bias."""
    if score_bias is None:
        return ()
    flags = {
        "TERM_DISTANCE": int(score_bias.distance),
        "TERM_PRIME_DISTANCE": int(score_bias.prime_distance),
        "TERM_SAME_TOKEN": int(score_bias.same_token),
        "TERM_MATCHES": score_bias.matches,
        "TERM_POINT_GRADIENTS": int(point_gradients),
    }
    return tuple((name, value) for name, value in flags.items() if value)


def check_score_bias(check: Shapes, score_bias: ScoreBias) -> None:
    """Raise UserError unless tokens (B, S), points (B, S, 3) and scalars (H, n) fit the terms in use."""
    operation = check.operation
    check("score_bias.tokens", score_bias.tokens, "B S")
    if not 0 <= score_bias.matches <= MAXIMUM_MATCHES:
        raise UserError(f"{operation}: score_bias.matches is {score_bias.matches}; it must be 0 to {MAXIMUM_MATCHES}")
    if score_bias.count == 0:
        raise UserError(f"{operation}: argument score_bias names no term; give None instead")
    heads, count = check("score_bias.scalars", score_bias.scalars, "H n")
    if count != score_bias.count:
        raise UserError(
            f"{operation}: score_bias.scalars have shape {(heads, count)}; "
            f"the terms in use take ({heads}, {score_bias.count})"
        )
    if not score_bias.uses_points:
        return
    if score_bias.points is None:
        raise UserError(f"{operation}: score_bias.points are missing; a distance needs them, (B, S, 3)")
    *_, axes = check("score_bias.points", score_bias.points, "B S P")
    rows = element_strides(operation, "score_bias.points", score_bias.points)[1]
    if axes != 3 or (rows != 3 and score_bias.points.shape[1] > 1):
        raise UserError(
            f"{operation}: score_bias.points must have 3 coordinates, and those of a sequence be contiguous"
        )


def check_gradients(check: Shapes, score_bias: ScoreBias, dscore_bias: ScoreBiasGradients | None) -> None:
    """Raise UserError unless `dscore_bias` has arrays of the right shapes."""
    if dscore_bias is None:
        raise UserError(f"{check.operation}: argument dscore_bias is missing; a score bias adds its gradients to it")
    check("dscore_bias.scalars", dscore_bias.scalars, "H n")
    if dscore_bias.points is None:
        return
    if score_bias.points is None:
        raise UserError(f"{check.operation}: dscore_bias.points are given, but no distance is in use")
    check("dscore_bias.points", dscore_bias.points, "B S P")
    element_strides(check.operation, "dscore_bias.points", dscore_bias.points)


def padded_tokens(launcher: Launcher, variant: Variant, operation: str, tokens: Any) -> Any:
    """Tokens (B, S) padded for the kernels, (B, 2, PAD_BEFORE + S + PAD_AFTER): once for queries, once for keys.

    The padding matches nothing. Computed at every call, O(B·S), in the launcher's scratch memory.
    """
    batch, positions = tokens.shape
    length = PAD_BEFORE + positions + PAD_AFTER
    padded = launcher.scratch("padded_tokens", (batch, 2, length), "int32")
    stride = element_strides(operation, "score_bias.tokens", tokens)[0]
    launcher.launch(
        variant,
        "attention_pad_tokens",
        (blocks_for(padded.size, _THREADS),),
        _THREADS,
        {"tokens": tokens, "padded": padded, "tokens_batch": stride, "count": padded.size, "keys": positions},
        strided=frozenset({"tokens"}),
    )
    return padded


def score_bias_arguments(operation: str, score_bias: ScoreBias | None, padded: Any) -> dict[str, Any]:
    """The terms and their `padded_tokens` as TermInputs of score_terms.cuh; null pointers if there are none."""
    points = score_bias.points if score_bias is not None and score_bias.uses_points else None
    return {
        "terms.padded": padded,
        "terms.points": points,
        "terms.scalars": None if score_bias is None else score_bias.scalars,
        "terms.padded_length": 0 if padded is None else padded.shape[2],
        "terms.points_batch": 0 if points is None else element_strides(operation, "terms.points", points)[0],
    }


def finish_scalars(launcher: Launcher, variant: Variant, partials: Any, gradients: Any) -> None:
    """gradients (H, n), possibly float32, += the sums of partials (B, H, tiles, n) over batch items and tiles."""
    batch, heads, tiles, _ = partials.shape
    sizes = {"batch": batch, "heads": heads, "tiles": tiles}
    arrays = {"partials": partials, "gradients": gradients}
    variant = dataclasses.replace(variant, gradient=gradients.dtype.name)
    launcher.launch(variant, "attention_terms_finish", (heads,), 32, arrays | sizes)


def finish_points(launcher: Launcher, variant: Variant, of_queries: Any, of_keys: Any, gradients: Any) -> None:
    """gradients (B, S, 3) += Σ_heads of of_queries (B, H, T, 3), at the last T positions, and of_keys (B, K, S, 3)."""
    _, heads, queries, _ = of_queries.shape
    batch, kv_heads, keys, _ = of_keys.shape
    count = batch * keys * 3
    arrays = {"of_queries": of_queries, "of_keys": of_keys, "gradients": gradients}
    stride = element_strides("attention_backward", "dscore_bias.points", gradients)[0]
    sizes = {"heads": heads, "kv_heads": kv_heads, "queries": queries, "keys": keys}
    launcher.launch(
        variant,
        "attention_points_finish",
        (blocks_for(count, _THREADS),),
        _THREADS,
        arrays | {"gradients_batch": stride, "count": count} | sizes,
        strided=frozenset({"gradients"}),
    )
