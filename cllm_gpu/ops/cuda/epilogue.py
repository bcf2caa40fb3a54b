"""Epilogues: operations fused into the kernel of a matrix product out (M, N) = a (M, K) · b (K, N)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["none", "bias", "gelu", "gelu gradient", "bias gradient"]


@dataclass(frozen=True)
class Epilogue:
    """An epilogue and the arrays it reads or writes; `vector` and `hidden` have the result's dtype.

    none            out = a·b
    bias            out = a·b + vector (N)
    gelu            hidden (M, N) = a·b + vector (N), or a·b if vector is None; out = gelu(hidden), tanh approximation
    gelu gradient   out = (a·b) ⊙ gelu'(hidden (M, N)); vector (N) = Σ_rows out, unless None
    bias gradient   out = a·b; vector (M) = Σ_k a
    """

    kind: Kind = "none"
    vector: Any | None = None
    hidden: Any | None = None


NONE = Epilogue()
