"""The lattice's terms of the attention scores, as cuda/score_terms.cuh takes them.

As `cllm_gpu.ops.reference.score_bias`. The attention kernels compute the terms; here are the checks of what
they are computed from, the variant that a choice of terms needs, and the last step of their gradients: the sums over
blocks and heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, blocks_for, element_strides
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreTermGradients, ScoreTerms
from cllm_gpu.utils.errors import UserError

STRIDED = frozenset({"terms.points"})
"""Arguments that may be views with strides of their own."""
PAD_BEFORE, PAD_AFTER = 8, 127
"""What stands around the tokens that the kernels compare: the constants of these names in score_terms.cuh."""
_THREADS = 128


def term_defines(terms: ScoreTerms | None, *, point_gradients: bool = False) -> tuple[tuple[str, int], ...]:
    """The -D flags that compile an attention source with these terms: of each only where it is in use."""
    if terms is None:
        return ()
    flags = {
        "TERM_DISTANCE": int(terms.distance),
        "TERM_PRIME_DISTANCE": int(terms.prime_distance),
        "TERM_SAME_TOKEN": int(terms.same_token),
        "TERM_MATCHES": terms.matches,
        "TERM_POINT_GRADIENTS": int(point_gradients),
    }
    return tuple((name, value) for name, value in flags.items() if value)


def check_terms(check: Shapes, terms: ScoreTerms) -> None:
    """UserError unless tokens (B, S), points (B, S, 3) and scalars (H, n) are what the terms in use need."""
    operation = check.operation
    check("terms.tokens", terms.tokens, "B S")
    if not 0 <= terms.matches <= MAXIMUM_MATCHES:
        raise UserError(f"{operation}: terms.matches is {terms.matches}; it must be 0 to {MAXIMUM_MATCHES}")
    if terms.count == 0:
        raise UserError(f"{operation}: argument terms names no term; give None instead")
    heads, count = check("terms.scalars", terms.scalars, "H n")
    if count != terms.count:
        raise UserError(
            f"{operation}: terms.scalars have shape {(heads, count)}; the terms in use take ({heads}, {terms.count})"
        )
    if not terms.uses_points:
        return
    if terms.points is None:
        raise UserError(f"{operation}: terms.points are missing; a distance needs them, (B, S, 3)")
    *_, axes = check("terms.points", terms.points, "B S P")
    rows = element_strides(operation, "terms.points", terms.points)[1]
    if axes != 3 or (rows != 3 and terms.points.shape[1] > 1):
        raise UserError(f"{operation}: terms.points must have 3 coordinates, and those of a sequence be contiguous")


def check_gradients(check: Shapes, terms: ScoreTerms, dterms: ScoreTermGradients | None) -> None:
    """UserError unless there are arrays of the right shapes to add the gradients to."""
    if dterms is None:
        raise UserError(f"{check.operation}: argument dterms is missing; terms need somewhere to add their gradients")
    check("dterms.scalars", dterms.scalars, "H n")
    if dterms.points is None:
        return
    if terms.points is None:
        raise UserError(f"{check.operation}: dterms.points are given, but no distance is in use")
    check("dterms.points", dterms.points, "B S P")
    element_strides(check.operation, "dterms.points", dterms.points)


def padded_tokens(launcher: Launcher, variant: Variant, operation: str, tokens: Any) -> Any:
    """What the kernels compare, (B, 2, PAD_BEFORE + S + PAD_AFTER): tokens (B, S) as those of queries and of keys.

    Around them stands what matches nothing. Made at every call: O(B·S), in the launcher's scratch.
    """
    batch, positions = tokens.shape
    length = PAD_BEFORE + positions + PAD_AFTER
    padded = launcher.scratch("padded_tokens", (batch, 2, length), "int32")
    stride = element_strides(operation, "terms.tokens", tokens)[0]
    launcher.launch(
        variant,
        "attention_pad_tokens",
        (blocks_for(padded.size, _THREADS),),
        _THREADS,
        {"tokens": tokens, "padded": padded, "tokens_batch": stride, "count": padded.size, "keys": positions},
        strided=frozenset({"tokens"}),
    )
    return padded


def term_arguments(operation: str, terms: ScoreTerms | None, padded: Any) -> dict[str, Any]:
    """The terms and their `padded_tokens` as TermInputs of score_terms.cuh; null pointers if there are none."""
    points = terms.points if terms is not None and terms.uses_points else None
    return {
        "terms.padded": padded,
        "terms.points": points,
        "terms.scalars": None if terms is None else terms.scalars,
        "terms.padded_length": 0 if padded is None else padded.shape[2],
        "terms.points_batch": 0 if points is None else element_strides(operation, "terms.points", points)[0],
    }


def finish_scalars(launcher: Launcher, variant: Variant, partials: Any, gradients: Any) -> None:
    """gradients (H, n), also float32, += the sums of partials (B, H, tiles, n) over batch items and tiles."""
    batch, heads, tiles, _ = partials.shape
    sizes = {"batch": batch, "heads": heads, "tiles": tiles}
    arrays = {"partials": partials, "gradients": gradients}
    variant = dataclasses.replace(variant, gradient=gradients.dtype.name)
    launcher.launch(variant, "attention_terms_finish", (heads,), 32, arrays | sizes)


def finish_points(launcher: Launcher, variant: Variant, of_queries: Any, of_keys: Any, gradients: Any) -> None:
    """gradients (B, S, 3) += of_queries (B, H, T, 3), at the last T positions, and of_keys (B, K, S, 3), over heads."""
    _, heads, queries, _ = of_queries.shape
    batch, kv_heads, keys, _ = of_keys.shape
    count = batch * keys * 3
    arrays = {"of_queries": of_queries, "of_keys": of_keys, "gradients": gradients}
    stride = element_strides("attention_backward", "dterms.points", gradients)[0]
    sizes = {"heads": heads, "kv_heads": kv_heads, "queries": queries, "keys": keys}
    launcher.launch(
        variant,
        "attention_points_finish",
        (blocks_for(count, _THREADS),),
        _THREADS,
        arrays | {"gradients_batch": stride, "count": count} | sizes,
        strided=frozenset({"gradients"}),
    )
