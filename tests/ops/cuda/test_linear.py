"""The affine map and its products against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.gemm import matmul
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward
from cllm_gpu.ops.reference import linear as reference
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import DTYPES, Device

# N, K, M: one of each; wide; two chunks of rows; two tiles of columns too, one by one and wide
SHAPES = [(1, 1, 1), (5, 8, 24), (70, 33, 17), (67, 3, 41), (70, 5, 264)]


def _draw(rng: np.random.Generator, storage: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[storage])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_linear_forward(device: Device, rng: Any, storage: str, shape: tuple[int, int, int], biased: bool) -> None:
    rows, inputs, outputs = shape
    x, weight, bias = (
        _draw(rng, storage, rows, inputs),
        _draw(rng, storage, outputs, inputs),
        _draw(rng, storage, outputs),
    )
    out = device.put(np.zeros((rows, outputs), x.dtype))
    linear_forward(device.launcher, device.put(x), device.put(weight), device.put(bias) if biased else None, out)
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    if biased:  # the product is rounded to the storage's dtype before the bias is added
        product = product.astype(np.float32).astype(x.dtype).astype(np.float64) if storage == "bfloat16" else product
        product += bias.astype(np.float64)
    # a product that lies between two bf16 numbers may round to either: half an ulp of it more
    slack = 0.0 if storage == "float32" or not biased else 2.0**15
    close("out", device.get(out), product, storage=storage, factor=4 + inputs + slack)


@pytest.mark.parametrize(
    ("storage", "gradient"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", [True, False])
def test_linear_backward(
    device: Device, rng: Any, storage: str, gradient: str, shape: tuple[int, int, int], accumulate: bool
) -> None:
    rows, inputs, outputs = shape
    x, dout, weight = (_draw(rng, storage, *s) for s in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    dweight, dbias = _draw(rng, gradient, outputs, inputs), _draw(rng, gradient, outputs)
    got = device.put(np.zeros_like(x)), device.put(dweight), device.put(dbias)
    linear_backward(device.launcher, *map(device.put, (dout, x, weight)), *got, accumulate=accumulate)
    wants = np.zeros(x.shape), dweight.astype(np.float64), dbias.astype(np.float64)
    given = [a.astype(np.float64) for a in (dout, x, weight)]
    reference.linear_backward(np, *given, *wants, accumulate=accumulate)
    for name, ours, theirs, kind, terms in zip(
        ("dx", "dweight", "dbias"), got, wants, (storage, gradient, gradient), (outputs, rows, rows), strict=True
    ):
        close(name, device.get(ours), theirs, storage=kind, factor=6 + terms)


def test_matmul_refuses_what_cublas_would_misread(device: Device) -> None:
    a, out = device.put(np.zeros((4, 6), np.float32)), device.put(np.zeros((4, 4), np.float32))
    with pytest.raises(UserError, match=r"argument b is not contiguous"):
        matmul(device.launcher, a, device.put(np.zeros((6, 8), np.float32))[:, ::2], out)
    with pytest.raises(UserError, match=r"shapes \(4, 6\) and \(5, 4\)"):
        matmul(device.launcher, a, device.put(np.zeros((5, 4), np.float32)), out)
    with pytest.raises(UserError, match=r"dtypes float32 and float64"):
        matmul(device.launcher, a, device.put(np.zeros((6, 4))), out)
