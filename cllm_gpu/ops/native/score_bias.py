"""The score bias as an argument of C++; see `cllm_gpu.ops.reference.score_bias`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import INT32, strided
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreBias, ScoreBiasGradients

_PITCHES = {
    "tokens": ("tokens_item",),
    "points": ("points_item", "points_row"),
    "scalars": ("scalars_row",),
    "dscalars": ("dscalars_row",),
    "dpoints": ("dpoints_item", "dpoints_row"),
}
_TERMS = ("distance", "prime_distance", "same_token", "matches")


class ScoreBiasArguments(ctypes.Structure):
    """`ScoreBias` of csrc/score_bias.hpp: addresses, strides in elements, the terms in use."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _PITCHES),
        *((name, ctypes.c_int64) for pitches in _PITCHES.values() for name in pitches),
        *((name, ctypes.c_int64) for name in _TERMS),
    )


def score_bias_arguments(
    score_bias: ScoreBias | None, dscore_bias: ScoreBiasGradients | None, q: Any, k: Any, scale: float
) -> Any | None:
    """Reference to the structure that entry points take for q (B, T, H, D), k (B, S, K, D); None if there is no bias.

    Raises ValueError unless every array is contiguous along its last axis and, except for the tokens, of q's dtype.
    """
    if score_bias is None:
        return None
    _check(score_bias, scale)
    (batch, positions), heads = k.shape[:2], q.shape[2]
    given = ScoreBiasArguments(**{name: getattr(score_bias, name) for name in _TERMS})
    uses_points, points = score_bias.distance or score_bias.prime_distance, (batch, positions, 3)
    _enter(given, "tokens", score_bias.tokens, (batch, positions), INT32)
    _enter(given, "scalars", score_bias.scalars, (heads, score_bias.count), q.dtype)
    if uses_points:
        _enter(given, "points", score_bias.points, points, q.dtype)
    if dscore_bias is not None and dscore_bias.scalars is not None:
        _enter(given, "dscalars", dscore_bias.scalars, (heads, score_bias.count), q.dtype)
    if dscore_bias is not None and dscore_bias.points is not None:
        if not uses_points:
            raise ValueError("dpoints is given, but no term uses the points")
        _enter(given, "dpoints", dscore_bias.points, points, q.dtype)
    return ctypes.byref(given)


def _check(score_bias: ScoreBias, scale: float) -> None:
    if not 0 <= score_bias.matches <= MAXIMUM_MATCHES:
        raise ValueError(f"matches is {score_bias.matches}; expected 0 … {MAXIMUM_MATCHES}")
    if scale == 0.0:
        raise ValueError("scale is 0; with a score bias it must not be")
    if (score_bias.distance or score_bias.prime_distance) and score_bias.points is None:
        raise ValueError("points is None, but a term uses them")


def _enter(given: ScoreBiasArguments, name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Check `x` and set its address and strides in the structure."""
    data, steps = strided(name, x, shape, dtype)
    setattr(given, name, data)
    for pitch, step in zip(_PITCHES[name], steps, strict=True):
        setattr(given, pitch, step)
