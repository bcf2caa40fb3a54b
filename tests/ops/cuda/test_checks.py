"""A launch with a wrong argument is one line that names the operation or kernel and the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.attention import attention_forward
from cllm_gpu.ops.cuda.column_sum import column_sum
from cllm_gpu.ops.cuda.cross_entropy import cross_entropy
from cllm_gpu.ops.cuda.embedding import embedding_forward
from cllm_gpu.ops.cuda.gelu import gelu_forward
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.layernorm import layernorm_backward, layernorm_forward
from cllm_gpu.ops.cuda.rotary import rotary_forward
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.devices import BFLOAT16, Device


def _f(*shape: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return np.zeros(shape, dtype)


def _norm(put: Any, launcher: Launcher, **changes: Any) -> None:
    given = {"x": _f(4, 8), "weight": _f(8), "bias": _f(8), "out": _f(4, 8), "mean": _f(4), "rstd": _f(4)} | changes
    layernorm_forward(launcher, *(x if x is None else put(x) for x in given.values()), epsilon=1e-5)


def _mask(seed: int = 1) -> Dropout:
    return Dropout(0.5, seed=seed, step=1, site=1)


def _norm_backward(put: Any, launcher: Launcher, dbranch: Any, dropout: Dropout | None) -> None:
    given = [_f(4, 8), _f(4, 8), _f(8), _f(4), _f(4), None, _f(4, 8), dbranch, _f(8), None]
    layernorm_backward(launcher, *(x if x is None else put(x) for x in given), accumulate=False, dropout=dropout)


def _embed(put: Any, launcher: Launcher, **changes: Any) -> None:
    given = {"tokens": _f(1, 4, dtype=np.int32), "table": _f(3, 8), "out": _f(4, 8)} | changes
    tokens, table, out = (put(x) for x in given.values())
    embedding_forward(launcher, tokens, table, None, out)


def _attend(put: Any, launcher: Launcher, **changes: Any) -> None:
    given = {"q": _f(1, 4, 2, 8), "k": _f(1, 4, 2, 8), "v": _f(1, 4, 2, 8), "out": _f(1, 4, 2, 8), "lse": _f(1, 2, 4)}
    given |= changes
    attention_forward(launcher, *map(put, given.values()), causal=True, scale=1.0)


def _sum(put: Any, launcher: Launcher, dtype: Any, out_dtype: Any) -> None:
    column_sum(launcher, put(_f(4, 8, dtype=dtype)), put(_f(8, dtype=out_dtype)), accumulate=False)


WRONG: dict[str, tuple[Callable[[Any, Launcher], None], str]] = {
    "dtype": (
        lambda p, a: _norm(p, a, weight=_f(8, dtype=np.float64)),
        r"layernorm_forward: argument weight has dtype",
    ),
    "gradient": (lambda p, a: _sum(p, a, np.float32, np.float64), r"gradients of dtype float64 beside arrays of dtype"),
    "narrow gradient": (lambda p, a: _sum(p, a, np.float32, BFLOAT16), r"they must be float32$"),
    "dtype of all": (lambda p, a: _norm(p, a, x=_f(4, 8, dtype=np.float64)), r"argument x has dtype float64; it must"),
    "statistics": (lambda p, a: _norm(p, a, mean=_f(4, dtype=np.float16)), r"argument mean has dtype float16"),
    "shape": (lambda p, a: _norm(p, a, out=_f(4, 9)), r"layernorm_forward: argument out has shape \(4, 9\); it must"),
    "axes": (lambda p, a: _norm(p, a, bias=_f(8, 1)), r"argument bias has shape \(8, 1\); it must have 1 axes"),
    "rows": (lambda p, a: _norm(p, a, rstd=_f(5)), r"argument rstd has shape \(5,\); it must be \(4,\)"),
    "heads": (lambda p, a: _attend(p, a, k=_f(1, 4, 3, 8), v=_f(1, 4, 3, 8)), r"argument k has 3 heads, which do not"),
    "head size": (
        lambda p, a: _attend(p, a, **{n: _f(1, 4, 2, 136) for n in "qkv"}, out=_f(1, 4, 2, 136)),
        r"argument q has head size 136; at most 128",
    ),
    "positions": (lambda p, a: _attend(p, a, k=_f(1, 3, 2, 8), v=_f(1, 3, 2, 8)), r"fewer than the 4 queries"),
    "odd head": (
        lambda p, a: rotary_forward(a, p(_f(1, 2, 1, 3)), p(_f(2, 1)), p(_f(2, 1))),
        r"last axis must be even",
    ),
    "tables": (
        lambda p, a: rotary_forward(a, p(_f(1, 2, 1, 4)), p(_f(2, 2)), p(_f(3, 2))),
        r"argument sine has shape \(3, 2\); it must be \(2, 2\)",
    ),
    "too many positions": (
        lambda p, a: embedding_forward(
            a, p(_f(1, 4, dtype=np.int32)), p(_f(3, 8)), p(_f(5, 8)), p(_f(4, 8)), first_position=2
        ),
        r"argument position_embedding has 5 positions; 4 from 2 on need 6",
    ),
    "token dtype": (
        lambda p, a: embedding_forward(a, p(_f(1, 4, dtype=np.int64)), p(_f(3, 8)), None, p(_f(4, 8))),
        r"argument tokens has dtype int64; it must be int32",
    ),
    "dtype in a struct": (
        lambda p, a: _embed(p, a, table=_f(3, 8, dtype=np.float64)),
        r"embedding_forward: argument token_embedding has dtype float64; it must be float32",
    ),
    "operand's dtype": (
        lambda p, a: _attend(p, a, k=_f(1, 4, 2, 8, dtype=np.float64)),
        r"attention_forward: argument k has dtype float64; it must be float32",
    ),
    "seed": (
        lambda p, a: embedding_forward(
            a, p(_f(1, 4, dtype=np.int32)), p(_f(3, 8)), None, p(_f(4, 8)), dropout=_mask(seed=2**64)
        ),
        r"embedding_forward: argument dropout.seed is 18446744073709551616, not a unsigned long long",
    ),
    "branch shape": (
        lambda p, a: _norm_backward(p, a, _f(4, 9), _mask()),
        r"layernorm_backward: argument dbranch has shape \(4, 9\); it must be \(4, 8\)",
    ),
    "branch without a mask": (
        lambda p, a: _norm_backward(p, a, _f(4, 8), None),
        r"layernorm_backward: arguments dbranch and dropout are given together or not at all",
    ),
    "mask without a branch": (
        lambda p, a: _norm_backward(p, a, None, _mask()),
        r"layernorm_backward: arguments dbranch and dropout are given together or not at all",
    ),
    "targets": (
        lambda p, a: cross_entropy(a, p(_f(4, 8)), p(_f(4)), p(_f(4)), ignore_index=-1, gradient_scale=None),
        r"argument targets has dtype float32; it must be int32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(device: Device, name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(UserError, match=message) as caught:
        call(device.put, device.launcher)
    assert "\n" not in str(caught.value)


def test_an_array_that_is_not_contiguous_is_named(device: Device) -> None:
    x = device.put(_f(4, 16))[:, ::2]
    with pytest.raises(UserError, match=r"gelu_forward: argument x is not contiguous: shape \(4, 8\), strides"):
        gelu_forward(device.launcher, x, None, device.put(_f(4, 8)))


def test_a_head_that_is_not_contiguous_is_named(device: Device) -> None:
    q, k = device.put(_f(1, 4, 2, 16))[..., ::2], device.put(_f(1, 4, 2, 8))
    with pytest.raises(UserError, match=r"argument q has strides .*; its last axis must be contiguous"):
        attention_forward(device.launcher, q, k, k, k, device.put(_f(1, 2, 4)), causal=True, scale=1.0)


def test_an_array_of_another_module_is_named(device: Device) -> None:
    arguments = {"x": device.put(_f(4)), "partials": [1.0], "size": 4}
    with pytest.raises(UserError, match=r"argument partials is a list; it must be a \w+ array"):
        device.launcher.launch(Variant("adam.cu", "float32"), "squared_norm", (1,), 32, arguments)


def test_an_address_between_elements_is_named(device: Device) -> None:
    shifted = device.put(np.zeros(4 * 8 * 4 + 1, np.uint8))[1:].view(np.float32).reshape(4, 8)
    with pytest.raises(UserError, match=r"argument x is not aligned to its 4-byte elements"):
        gelu_forward(device.launcher, shifted, None, device.put(_f(4, 8)))


def test_a_read_only_result_is_named() -> None:
    from tests.ops.cuda.devices import simulator_device

    out = _f(4, 8)
    out.flags.writeable = False
    with pytest.raises(UserError, match=r"gelu_forward: argument out is read-only"):
        gelu_forward(simulator_device().launcher, _f(4, 8), None, out)


def test_a_read_only_result_in_a_struct_is_named() -> None:
    from tests.ops.cuda.devices import simulator_device

    out = _f(4, 8)
    out.flags.writeable = False
    tokens, table = _f(1, 4, dtype=np.int32), _f(3, 8)
    table.flags.writeable = False  # what a kernel only reads may be
    with pytest.raises(UserError, match=r"embedding_forward: argument out is read-only"):
        embedding_forward(simulator_device().launcher, tokens, table, None, out)


def test_a_field_of_a_struct_that_is_missing_or_unknown_is_named(device: Device) -> None:
    arguments = {"size": 4, "weights.decay": 0.5}
    with pytest.raises(
        TypeError, match=r"^sgd_step takes parameters, .*; missing: parameters, .*unknown: weights.decay"
    ):
        device.launcher.launch(Variant("adam.cu", "float32"), "sgd_step", (1,), 256, arguments)


def test_a_call_that_differs_from_the_source_is_a_programming_error(device: Device) -> None:
    with pytest.raises(TypeError, match="squared_norm takes"):
        device.launcher.launch(Variant("adam.cu", "float32"), "squared_norm", (1,), 32, {"x": None})


def test_too_large_a_grid_is_refused(device: Device) -> None:
    arguments = {"x": None, "partials": None, "size": 0}
    with pytest.raises(UserError, match=r"squared_norm: a grid of \(2147483648,\) blocks passes what CUDA takes"):
        device.launcher.launch(Variant("adam.cu", "float32"), "squared_norm", (2**31,), 32, arguments)


def test_a_strided_view_that_is_not_aligned_takes_the_narrow_way(device: Device) -> None:
    """Rows that begin at odd addresses give the same numbers as aligned ones."""
    rng = np.random.default_rng(1)
    whole = rng.standard_normal((1, 6, 1, 33)).astype(np.float32)
    shifted, aligned = device.put(whole)[..., 1:], device.put(np.ascontiguousarray(whole[..., 1:]))
    results = []
    for q in (shifted, aligned):
        out, lse = device.put(_f(1, 6, 1, 32)), device.put(_f(1, 1, 6))
        attention_forward(device.launcher, q, q, q, out, lse, causal=True, scale=0.2)
        results.append(device.get(out))
    assert np.array_equal(*results)
