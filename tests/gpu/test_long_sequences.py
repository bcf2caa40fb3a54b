"""Attention where T·T passes 2^31: the rows at both ends against the reference over those rows alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.kernels.cases import DTYPES
from cllm_gpu.ops.cuda.attention import BackwardMethod, attention_backward, attention_forward
from cllm_gpu.ops.reference import attention as reference
from tests.ops.cuda.devices import Device, cupy_device
from tests.ops.cuda.test_attention import EITHER

HEAD_SIZE = 64
ROWS = 64
RELATIVE = {"float32": 1e-4, "bfloat16": 2.5e-2}
"""Of the largest value. float32: exponents near the sum of 65,536 weights; bf16: three to six half ulps of 2^-8."""


def _slices(length: int) -> dict[str, tuple[slice, slice]]:
    """name → (queries, the keys they see): the first rows see themselves, the last ones everything."""
    return {"first": (slice(0, ROWS), slice(0, ROWS)), "last": (slice(length - ROWS, length), slice(0, length))}


def check_ends(device: Device, storage: str, length: int, method: BackwardMethod) -> None:
    """Output of both ends; dq of both ends; dk and dv of the last keys, which only the last queries see."""
    xp, rng = device.launcher.xp, np.random.default_rng(5)
    q, k, v, dout = (
        device.put(rng.standard_normal((1, length, 1, HEAD_SIZE), np.float32).astype(DTYPES[storage])) for _ in "qkvo"
    )
    out, dq, dk, dv = (xp.empty_like(q) for _ in range(4))
    lse = xp.empty((1, 1, length), dtype="float32")
    options: dict[str, Any] = {"causal": True, "scale": HEAD_SIZE**-0.5}
    attention_forward(device.launcher, q, k, v, out, lse, **options)
    attention_backward(device.launcher, dout, q, k, v, out, lse, dq, dk, dv, method=method, **options)
    for name, (queries, keys) in _slices(length).items():
        few = [x.astype(np.float64) for x in (q[:, queries], k[:, keys], v[:, keys])]
        want, want_lse = xp.empty_like(few[0]), xp.empty((1, 1, ROWS))
        reference.attention_forward(xp, *few, want, want_lse, **options)
        _close(f"{name} out", out[:, queries], want, storage)
        _close(f"{name} lse", lse[:, :, queries], want_lse, "float32")
        gradients = [xp.empty_like(x) for x in few]
        wide = dout[:, queries].astype(np.float64)
        reference.attention_backward(xp, wide, *few, want, want_lse, *gradients, **options)
        _close(f"{name} dq", dq[:, queries], gradients[0], storage)
        if name == "last":
            _close("last dk", dk[:, -ROWS:], gradients[1][:, -ROWS:], storage)
            _close("last dv", dv[:, -ROWS:], gradients[2][:, -ROWS:], storage)


def _close(what: str, got: Any, want: Any, storage: str) -> None:
    error, largest = float(abs(got.astype(np.float64) - want).max()), float(abs(want).max())
    print(f"{what} {storage}: error {error:.3g}, largest value {largest:.3g}")
    if not (error <= RELATIVE[storage] * largest):
        pytest.fail(f"{what} ({storage}): error {error:.3g} is above {RELATIVE[storage]} of {largest:.3g}")


@pytest.mark.parametrize("storage", list(DTYPES))
@EITHER
def test_both_ends(device: Device, storage: str, method: BackwardMethod) -> None:
    check_ends(device, storage, 150, method)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", list(DTYPES))
@EITHER
def test_65536_positions(storage: str, method: BackwardMethod) -> None:
    """T·T = 2^32; memory stays linear in T: the scores alone would take 8 GB or more."""
    device = cupy_device()
    pool = device.launcher.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    check_ends(device, storage, 65536, method)
    assert pool.total_bytes() - before < 1 << 30
