"""Floating-point operations (FLOP) of a training step, per token."""

from __future__ import annotations

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import parameter_specs

FORMULA = "6·N + 12·L·H·D·T"
"""FLOP per token, forward and backward: see `flop_per_token`."""


def counted_parameters(a: Architecture) -> int:
    """N: every parameter that a token is computed with, the head once.

    Tables that are only looked up are left out: position embedding, lattice points, and the token embedding where the
    head has weights of its own.
    """
    return sum(spec.size for spec in parameter_specs(a) if not spec.looked_up)


def flop_per_token(a: Architecture) -> int:
    """FORMULA with T the context: attention over all T keys, as if it were not causal."""
    return 6 * counted_parameters(a) + 12 * a.layers * a.width * a.context
