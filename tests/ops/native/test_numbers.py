"""The exponential's accuracy, non-finite numbers, repeated runs, refused arguments, and loading."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.ops.native import library as library_module
from cllm_gpu.ops.native.attention import attention_forward
from cllm_gpu.ops.native.cross_entropy import cross_entropy
from cllm_gpu.ops.native.embedding import embedding_forward
from cllm_gpu.ops.native.gelu import gelu_forward
from cllm_gpu.ops.native.layernorm import layernorm_forward
from cllm_gpu.ops.native.library import load_library
from cllm_gpu.ops.native.linear import linear_forward
from cllm_gpu.ops.native.sgd import sgd_step
from cllm_gpu.ops.native.squared_norm import squared_norm
from cllm_gpu.utils import compiler
from cllm_gpu.utils.errors import UserError


def _exponential(library, x):
    out = np.empty_like(x)
    library.kernels(x).exponentials(x.size, x.ctypes.data, out.ctypes.data)
    return out


def test_exponential_float32(library):
    """Within 2 ulp of the exact value over all normal results; every 64th float32 of both signs."""
    bits = np.arange(0, 0x42B1_0000, 64, dtype=np.uint32)
    positive = bits.view(np.float32)
    for x in (positive[positive <= 88.72283], -positive[positive <= 87.336]):
        exact = np.exp(x.astype(np.float64))
        ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
        error = float(np.max(np.abs(_exponential(library, x) - exact) / ulp))
        print(f"exponential float32: {error:.3f} ulp")
        assert error <= 2.0


def test_exponential_float64(library, generator):
    """NumPy's float64 exponential is within 1 ulp itself, so 3 ulp is what its 2 can show."""
    x = generator.uniform(-708.3, 709.7, 300_001)
    want = np.exp(x)
    assert float(np.max(np.abs(_exponential(library, x) - want) / np.spacing(want))) <= 3.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exponential_at_the_ends(library, dtype):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e4, -1e4, 5e-324, -1e-30], dtype)
    want = np.array([1, 1, np.inf, 0, np.nan, np.inf, 0, 1, 1], dtype)
    assert np.array_equal(_exponential(library, x), want, equal_nan=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_numbers_reach_the_loss_and_the_norm(library, generator, bad):
    x = generator.standard_normal((3, 40)).astype(np.float32)
    x[1, 17] = bad
    out, mean, rstd = np.empty_like(x), np.empty(3, np.float32), np.empty(3, np.float32)
    weight = np.ones(40, np.float32)
    layernorm_forward(library, x, weight, None, out, mean, rstd, epsilon=1e-5)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()
    losses = np.zeros(3, np.float32)
    cross_entropy(library, x.copy(), np.zeros(3, np.int32), losses, ignore_index=-1, gradient_scale=1.0)
    assert list(np.isfinite(losses)) == [True, False, True]
    linear_forward(library, x, generator.standard_normal((40, 40)).astype(np.float32), None, out)
    assert list(np.isfinite(out).all(axis=1)) == [True, False, True]
    gelu_forward(library, x.copy(), None, out)
    assert out[1, 17] == bad or np.isnan(out[1, 17])
    assert not np.isfinite(squared_norm(library, x.reshape(-1)))


@pytest.mark.parametrize(("where", "bad"), [(x, np.nan) for x in "qkv"] + [("q", np.inf), ("v", np.inf)])
def test_non_finite_numbers_pass_attention(library, generator, bad, where):
    arrays = dict(zip("qkv", generator.standard_normal((3, 1, 9, 1, 8)).astype(np.float32), strict=True))
    arrays[where][0, 4, 0, 3] = bad
    out, lse = np.zeros((1, 9, 1, 8), np.float32), np.zeros((1, 1, 9), np.float32)
    attention_forward(library, *arrays.values(), out, lse, causal=True, scale=0.35)
    assert not np.isfinite(out[0, 4]).all()


def test_same_bits_at_every_run(library, generator):
    """A product over several blocks of k, and attention over several blocks of queries."""
    x, weight = generator.standard_normal((2, 200, 900)).astype(np.float32)
    outs = [np.empty((200, 200), np.float32) for _ in range(3)]
    for out in outs:
        linear_forward(library, x, weight, None, out)
    assert np.array_equal(outs[0], outs[1])
    assert np.array_equal(outs[0], outs[2])


def test_refused_arguments(library):
    x = np.zeros((4, 6), np.float32)
    out, weight = np.zeros((4, 3), np.float32), np.zeros((3, 6), np.float32)
    with pytest.raises(ValueError, match="weight is float64"):
        linear_forward(library, x, weight.astype(np.float64), None, out)
    with pytest.raises(ValueError, match=r"bias is float32 \(4,\).*expected float32 \(3,\)"):
        linear_forward(library, x, weight, np.zeros(4, np.float32), out)
    with pytest.raises(ValueError, match=r"out is .*C-contiguous"):
        linear_forward(library, x, weight, None, np.zeros((3, 4), np.float32).T)
    with pytest.raises(ValueError, match="float32 and float64, not float16"):
        linear_forward(library, x.astype(np.float16), weight, None, out)
    q = np.zeros((1, 3, 2, 4), np.float32)
    with pytest.raises(ValueError, match=r"q is .*contiguous along the last axis"):
        attention_forward(
            library, q.swapaxes(1, 3).copy().swapaxes(1, 3), q, q, q, np.zeros((1, 2, 3), np.float32),
            causal=True, scale=1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="S at least T"):
        attention_forward(library, q, q[:, :2], q, q, q, causal=True, scale=1.0)
    with pytest.raises(ValueError, match="decayed is 9"):
        sgd_step(
            library, x.reshape(-1)[:8], x.reshape(-1)[:8], None,
            rate=1.0, momentum=0.0, weight_decay=0.0, decayed=9, gradient_scale=1.0,
        )  # fmt: skip


def test_indices_outside_are_refused(library):
    table, out = np.zeros((5, 3), np.float32), np.zeros((2, 3), np.float32)
    for token in (-1, 5):
        with pytest.raises(IndexError, match="tokens holds an index outside 0 … 4"):
            embedding_forward(library, np.array([[0, token]], np.int32), table, None, out)
    with pytest.raises(IndexError, match="targets"):
        cross_entropy(
            library, out, np.array([1, 3], np.int32), np.zeros(2, np.float32), ignore_index=-1, gradient_scale=None
        )


def test_without_a_compiler(monkeypatch):
    """ "native" says what is missing; "auto" takes numpy and says why."""
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with pytest.raises(UserError, match="no C\\+\\+ compiler found"):
        get_backend("native")
    monkeypatch.setattr("cllm_gpu.devices.driver.missing", lambda *_, **__: "no GPU here")
    backend = get_backend("auto")
    assert backend.name == "numpy"
    assert "no C++ compiler found" in backend.description


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(library_module, "FLAGS", ("--no-such-flag",))
    monkeypatch.setattr("cllm_gpu.devices.driver.missing", lambda *_, **__: "no GPU here")
    with pytest.raises(UserError, match="cannot compile operations"):
        load_library()
    assert get_backend("auto").name == "numpy"


def test_windows_takes_numpy(monkeypatch):
    """A platform the library is not built for: one clear line, and "auto" goes on with numpy."""

    class Windows:
        name = "nt"

    monkeypatch.setattr(library_module, "os", Windows)
    monkeypatch.setattr("cllm_gpu.devices.driver.missing", lambda *_, **__: "no GPU here")
    with pytest.raises(UserError, match="not available on Windows"):
        get_backend("native")
    assert get_backend("auto").name == "numpy"


def test_native_backend_description(library):
    backend = get_backend("native", workers=3)
    assert (backend.name, backend.workers) == ("native", 3)
    assert "matrix products" in backend.description
