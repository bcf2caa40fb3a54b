"""FLOP and bytes of kernels, for rates.

Bytes are the minimum a kernel must move: each input read once, each output written once, without small vectors (biases,
weights and statistics of rows or columns). Additional traffic therefore never improves a fraction of the copy
bandwidth.
"""

from __future__ import annotations

ADAM_FLOAT32 = 4 * 4 + 3 * 4
"""Bytes per parameter: gradient, parameter and both moments read, the last three written."""
ADAM_BFLOAT16 = 2 + 3 * 4 + 3 * 4 + 2
"""Bytes per parameter: bf16 gradient, fp32 master weight and moments read; the last three and a bf16 copy written."""


def attention_forward_flops(batch: int, heads: int, length: int, head_size: int, *, causal: bool) -> float:
    """FlashAttention's convention (Dao 2023, section 4.1): 4·T²·D per head, half of it when causal.

    >>> attention_forward_flops(1, 1, 1024, 64, causal=False)
    268435456.0
    """
    return 4.0 * batch * heads * length**2 * head_size / (2 if causal else 1)


def attention_backward_flops(batch: int, heads: int, length: int, head_size: int, *, causal: bool) -> float:
    """The same convention: two matrix products in the forward, five in the backward, hence 2.5 times the forward."""
    return 2.5 * attention_forward_flops(batch, heads, length, head_size, causal=causal)


def matmul_flops(m: int, n: int, k: int) -> float:
    """2·m·n·k: a multiplication and an addition each."""
    return 2.0 * m * n * k


def passes_bytes(elements: int, itemsize: int, passes: int) -> int:
    """Bytes of `passes` arrays of `elements`, each read or written once."""
    return elements * itemsize * passes


def tera_per_second(amount: float, milliseconds: float) -> float:
    """The rate of an amount of FLOP or bytes in a time, in 10^12 per second.

    >>> tera_per_second(2e12, 500.0)
    4.0
    """
    return amount / milliseconds / 1e9
