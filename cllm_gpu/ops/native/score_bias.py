"""Score terms on their way to C++; see `cllm_gpu.ops.reference.score_bias`."""

from __future__ import annotations

import ctypes
from typing import Any

from cllm_gpu.ops.native.arguments import INT32, strided
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreTermGradients, ScoreTerms

_PITCHES = {
    "tokens": ("tokens_item",),
    "points": ("points_item", "points_row"),
    "scalars": ("scalars_row",),
    "dscalars": ("dscalars_row",),
    "dpoints": ("dpoints_item", "dpoints_row"),
}
_TERMS = ("distance", "prime_distance", "same_token", "matches")


class TermArguments(ctypes.Structure):
    """`ScoreTerms` of csrc/score_bias.hpp: addresses, strides in elements, the terms in use."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _PITCHES),
        *((name, ctypes.c_int64) for pitches in _PITCHES.values() for name in pitches),
        *((name, ctypes.c_int64) for name in _TERMS),
    )


def term_arguments(
    terms: ScoreTerms | None, dterms: ScoreTermGradients | None, q: Any, k: Any, scale: float
) -> Any | None:
    """What the entry points take for the terms of q (B, T, H, D) and k (B, S, K, D): a reference to a structure.

    None for None. Every array is contiguous along its last axis and, but for the tokens, of the dtype of q.
    ValueError naming what is not.
    """
    if terms is None:
        return None
    _check(terms, scale)
    (batch, positions), heads = k.shape[:2], q.shape[2]
    given = TermArguments(**{name: getattr(terms, name) for name in _TERMS})
    uses_points, points = terms.distance or terms.prime_distance, (batch, positions, 3)
    _enter(given, "tokens", terms.tokens, (batch, positions), INT32)
    _enter(given, "scalars", terms.scalars, (heads, terms.count), q.dtype)
    if uses_points:
        _enter(given, "points", terms.points, points, q.dtype)
    if dterms is not None and dterms.scalars is not None:
        _enter(given, "dscalars", dterms.scalars, (heads, terms.count), q.dtype)
    if dterms is not None and dterms.points is not None:
        if not uses_points:
            raise ValueError("dpoints is given, but no term sees the points")
        _enter(given, "dpoints", dterms.points, points, q.dtype)
    return ctypes.byref(given)


def _check(terms: ScoreTerms, scale: float) -> None:
    if not 0 <= terms.matches <= MAXIMUM_MATCHES:
        raise ValueError(f"matches is {terms.matches}; expected 0 … {MAXIMUM_MATCHES}")
    if scale == 0.0:
        raise ValueError("scale is 0; expected another number where there are score terms")
    if (terms.distance or terms.prime_distance) and terms.points is None:
        raise ValueError("points is None, but a term sees them")


def _enter(given: TermArguments, name: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Address and strides of `x`, checked."""
    data, steps = strided(name, x, shape, dtype)
    setattr(given, name, data)
    for pitch, step in zip(_PITCHES[name], steps, strict=True):
        setattr(given, pitch, step)
