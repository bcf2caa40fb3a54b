"""Layer norm, GELU, cross-entropy and column sums against the float64 reference, at shapes that find bugs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.column_sum import column_sum
from cllm_gpu.ops.cuda.cross_entropy import cross_entropy
from cllm_gpu.ops.cuda.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.cuda.layernorm import layernorm_backward, layernorm_forward, residual_layernorm_forward
from cllm_gpu.ops.reference import cross_entropy as reference_cross_entropy
from cllm_gpu.ops.reference import gelu as reference_gelu
from cllm_gpu.ops.reference import layernorm as reference_layernorm
from cllm_gpu.ops.reference.dropout import Dropout
from tests.ops.cuda.comparison import close, tied_dropout
from tests.ops.cuda.devices import DTYPES, Device

# one row; a tile and one more; odd columns (no vector access); more than one warp's registers; beyond a block's
SHAPES = [(1, 1), (5, 8), (9, 33), (70, 64), (9, 256), (5, 301), (3, 1024), (6, 1029), (2, 2056), (3, 4501), (2, 17000)]


def _draw(rng: np.random.Generator, storage: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[storage])


def _wide(*arrays: Any) -> list[Any]:
    return [None if array is None else array.astype(np.float64) for array in arrays]


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_layernorm_forward(device: Device, rng: Any, storage: str, shape: tuple[int, int], biased: bool) -> None:
    x, weight = _draw(rng, storage, *shape), _draw(rng, storage, shape[1])
    bias = _draw(rng, storage, shape[1]) if biased else None
    out, mean, rstd = device.put(np.zeros_like(x)), *(device.put(np.zeros(shape[0], np.float32)) for _ in range(2))
    put_bias = None if bias is None else device.put(bias)
    layernorm_forward(device.launcher, device.put(x), device.put(weight), put_bias, out, mean, rstd, epsilon=1e-5)
    wants = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    reference_layernorm.layernorm_forward(np, *_wide(x, weight, bias), *wants, epsilon=1e-5)
    close("out", device.get(out), wants[0], storage=storage, factor=40)
    close("mean", device.get(mean), wants[1], storage="float32", factor=40)
    close("rstd", device.get(rstd), wants[2], storage="float32", factor=20)


@pytest.mark.parametrize("shape", [(5, 33), (3, 1024)], ids=str)
def test_layernorm_of_rows_far_from_zero(device: Device, rng: Any, shape: tuple[int, int]) -> None:
    """The variance is taken about the mean: 1 beside a mean of 1000, where mean(x²) − mean² has no digit right.

    The mean is known to 1000·2^-24 times a few, 2e-4; a variance about it is off by the square of that.
    """
    x = (1000.0 + rng.standard_normal(shape)).astype(np.float32)
    out, mean, rstd = device.put(np.zeros_like(x)), *(device.put(np.zeros(shape[0], np.float32)) for _ in range(2))
    weight = device.put(np.ones(shape[1], np.float32))
    layernorm_forward(device.launcher, device.put(x), weight, None, out, mean, rstd, epsilon=1e-5)
    wants = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    reference_layernorm.layernorm_forward(np, *_wide(x, np.ones(shape[1]), None), *wants, epsilon=1e-5)
    assert np.abs(device.get(rstd) / wants[2] - 1.0).max() <= 1e-6
    assert np.abs(device.get(out) - wants[0]).max() <= 1e-3


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_residual_layernorm_forward(
    device: Device, rng: Any, storage: str, shape: tuple[int, int], dropped: bool
) -> None:
    """The residual sum has the reference's own bits; the rest is the layer norm of it."""
    residual, branch = _draw(rng, storage, *shape), _draw(rng, storage, *shape)
    weight, bias = _draw(rng, storage, shape[1]), _draw(rng, storage, shape[1])
    dropout = tied_dropout(seed=2**40 + 7, step=3, site=2, first_element=6) if dropped else None
    out, mean, rstd = device.put(np.zeros_like(branch)), *(device.put(np.zeros(shape[0], np.float32)) for _ in "mr")
    stream = device.put(residual)
    residual_layernorm_forward(
        device.launcher, stream, device.put(branch), device.put(weight), device.put(bias), stream, out, mean, rstd,
        epsilon=1e-5, dropout=dropout,
    )  # fmt: skip
    wanted = _expected_residual(residual, branch, dropout)
    assert np.array_equal(device.get(stream).astype(np.float32), wanted.astype(np.float32))
    wants = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[0])
    reference_layernorm.layernorm_forward(np, *_wide(wanted, weight, bias), *wants, epsilon=1e-5)
    close("out", device.get(out), wants[0], storage=storage, factor=40)
    close("mean", device.get(mean), wants[1], storage="float32", factor=40)
    close("rstd", device.get(rstd), wants[2], storage="float32", factor=20)


def _expected_residual(residual: Any, branch: Any, dropout: Dropout | None) -> Any:
    """residual + dropout(branch) with each of the two steps rounded to the storage's dtype."""
    kept = branch.astype(np.float32)
    if dropout is not None:
        reference_layernorm.dropout_forward(np, kept, kept, dropout=dropout)
    kept = kept.astype(residual.dtype).astype(np.float32)
    return (residual.astype(np.float32) + kept).astype(residual.dtype)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("in_place", [True, False])
def test_layernorm_backward(device: Device, rng: Any, storage: str, shape: tuple[int, int], in_place: bool) -> None:
    """`in_place`: added to the stream's gradient and to the parameters', as in the model without dropout."""
    rows, columns = shape
    x, dout, dresidual = (_draw(rng, storage, *shape) for _ in range(3))
    weight, old_weight, old_bias = (_draw(rng, storage, columns) for _ in range(3))
    mean = x.astype(np.float64).mean(axis=1).astype(np.float32)
    rstd = (1.0 / np.sqrt(x.astype(np.float64).var(axis=1) + 1e-5)).astype(np.float32)
    dweight, dbias = device.put(old_weight), device.put(old_bias)
    stream = device.put(dresidual) if in_place else None
    dx = stream if stream is not None else device.put(np.zeros_like(x))
    layernorm_backward(
        device.launcher,
        *map(device.put, (dout, x, weight, mean, rstd)),
        stream,
        dx,
        None,
        dweight,
        dbias,
        accumulate=in_place,
        dropout=None,
    )
    wants = np.zeros(shape), None, *_wide(old_weight, old_bias)
    given = _wide(dout, x, weight, mean, rstd, dresidual if in_place else None)
    reference_layernorm.layernorm_backward(np, *given, *wants, accumulate=in_place, dropout=None)
    close("dx", device.get(dx), wants[0], storage=storage, factor=60)
    close("dweight", device.get(dweight), wants[2], storage=storage, factor=30 + rows)
    close("dbias", device.get(dbias), wants[3], storage=storage, factor=10 + rows)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", ["apart", "dout", "dx"])
def test_layernorm_backward_into_a_branch(
    device: Device, rng: Any, storage: str, shape: tuple[int, int], place: str
) -> None:
    """The branch's gradient is dx through the mask, wherever it lies; what else is written has the bits without it."""
    dropout = tied_dropout(seed=2**40 + 7, step=3, site=2, first_element=6)
    x, dout, dresidual = (_draw(rng, storage, *shape) for _ in range(3))
    weight, mean, rstd = _draw(rng, storage, shape[1]), *(_draw(rng, "float32", shape[0]) for _ in "mr")
    found = []
    for mask in (None, dropout):
        given = [device.put(array) for array in (dout, x, weight, mean, rstd, dresidual)]
        sums = [device.put(np.zeros_like(weight)) for _ in range(2)]
        dx = given[5]
        dbranch = {"apart": device.put(np.zeros_like(x)), "dout": given[0], "dx": dx}[place] if mask else None
        layernorm_backward(device.launcher, *given, dx, dbranch, *sums, accumulate=False, dropout=mask)
        found.append([None if array is None else device.get(array) for array in (dx, *sums, dbranch)])
    for ours, theirs in zip(found[1][place == "dx" : 3], found[0][place == "dx" : 3], strict=True):
        assert np.array_equal(ours, theirs)
    want = np.zeros(shape)
    wants = want, want, np.zeros(shape[1]), None
    reference_layernorm.layernorm_backward(
        np, *_wide(dout, x, weight, mean, rstd, dresidual), *wants, accumulate=False, dropout=dropout
    )
    close("dbranch", found[1][3], want, storage=storage, factor=60)
    if storage == "float32":
        two_steps = found[0][0].copy()
        reference_layernorm.dropout_forward(np, two_steps, two_steps, dropout=dropout)
        assert np.array_equal(found[1][3], two_steps)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_gelu_forward(device: Device, rng: Any, storage: str, shape: tuple[int, int], biased: bool) -> None:
    x = (3 * _draw(rng, "float32", *shape)).astype(DTYPES[storage])
    bias = _draw(rng, storage, shape[1]) if biased else None
    h, out = device.put(x), device.put(np.zeros_like(x))
    gelu_forward(device.launcher, h, None if bias is None else device.put(bias), out)
    kept = x if bias is None else (x.astype(np.float32) + bias.astype(np.float32)).astype(x.dtype)
    assert np.array_equal(device.get(h).astype(np.float32), kept.astype(np.float32))
    want = np.zeros(shape)
    reference_gelu.gelu_forward(np, kept.astype(np.float64), None, want)
    close("out", device.get(out), want, storage=storage, factor=8)


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", [True, False])
def test_gelu_backward(device: Device, rng: Any, storage: str, shape: tuple[int, int], accumulate: bool) -> None:
    x = (3 * _draw(rng, "float32", *shape)).astype(DTYPES[storage])
    dout, old = _draw(rng, storage, *shape), _draw(rng, storage, shape[1])
    dx, dbias = device.put(dout), device.put(old)
    gelu_backward(device.launcher, dx, device.put(x), dx, dbias, accumulate=accumulate)
    want, want_bias = np.zeros(shape), old.astype(np.float64)
    reference_gelu.gelu_backward(np, *_wide(dout, x), want, want_bias, accumulate=accumulate)
    # 1 − tanh² has an error of one eps, multiplied by h·√(2/π)·(1 + 0.134·h²), up to 20 where it is not 0 yet
    close("dx", device.get(dx), want, storage=storage, factor=24)
    close("dbias", device.get(dbias), want_bias, storage=storage, factor=24 + shape[0])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 40), (600, 5)], ids=str)
@pytest.mark.parametrize("accumulate", [True, False])
def test_column_sum(device: Device, rng: Any, storage: str, shape: tuple[int, int], accumulate: bool) -> None:
    x, old = _draw(rng, storage, *shape), _draw(rng, "float32", shape[1])
    out = device.put(old)
    column_sum(device.launcher, device.put(x), out, accumulate=accumulate)
    want = x.astype(np.float64).sum(axis=0) + (old if accumulate else 0.0)
    close("sum", device.get(out), want, storage="float32", factor=4 + shape[0])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 33000)], ids=str)
@pytest.mark.parametrize("gradient_scale", [None, 0.125])
def test_cross_entropy(
    device: Device, rng: Any, storage: str, shape: tuple[int, int], gradient_scale: float | None
) -> None:
    rows, columns = shape
    x = (4 * _draw(rng, "float32", *shape)).astype(DTYPES[storage])
    targets = rng.integers(0, columns, rows).astype(np.int32)
    targets[rows // 2 : rows // 2 + (rows > 2)] = -1
    logits, losses = device.put(x), device.put(np.full(rows, np.nan, np.float32))
    cross_entropy(device.launcher, logits, device.put(targets), losses, ignore_index=-1, gradient_scale=gradient_scale)
    want, want_losses = x.astype(np.float64), np.zeros(rows)
    reference_cross_entropy.cross_entropy(
        np, want, targets, want_losses, ignore_index=-1, gradient_scale=gradient_scale
    )
    close("losses", device.get(losses), want_losses, storage="float32", factor=20)
    if gradient_scale is None:
        assert np.array_equal(device.get(logits).astype(np.float32), x.astype(np.float32))
    else:
        close("dlogits", device.get(logits), want, storage=storage, factor=40)


def test_cross_entropy_of_a_target_outside_the_vocabulary_is_nan(device: Device) -> None:
    logits, losses = device.put(np.zeros((2, 5), np.float32)), device.put(np.zeros(2, np.float32))
    targets = device.put(np.array([5, 1], np.int32))
    cross_entropy(device.launcher, logits, targets, losses, ignore_index=-1, gradient_scale=1.0)
    got = device.get(losses)
    assert np.isnan(got[0])
    assert abs(got[1] - np.log(5.0)) <= 1e-6
