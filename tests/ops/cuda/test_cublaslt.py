"""Products through cuBLASLt, on a stand-in of its binding that computes on the host: what we ask of it, and when.

The stand-in reads our descriptors as the library would, so transposition, leading dimensions, epilogues and pointers
are those a GPU gets. Bounds: the stand-in's product is exact, so a result is rounded once, and a sum of K terms in
float32 by our own kernels or NumPy grows by K roundings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.cublaslt import WORKSPACE_BYTES
from cllm_gpu.ops.cuda.epilogue import Epilogue, Kind
from cllm_gpu.ops.cuda.gemm import matmul, matmul_with
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward
from cllm_gpu.ops.cuda.mlp import mlp_backward, mlp_forward
from cllm_gpu.ops.reference import linear as reference_linear
from cllm_gpu.ops.reference import mlp as reference_mlp
from tests.ops.cuda import lt_stand_in
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import DTYPES, simulator_or_skip
from tests.ops.cuda.lt_stand_in import NoKernel, StandIn, launcher_with

Array = np.ndarray[Any, Any]
SHAPES = [(1, 1, 1), (5, 8, 24), (7, 33, 16), (70, 3, 41)]  # N, K, M
STORAGES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


def _at(storage: str, offset: int, *shape: int) -> Array:
    """Zeros whose address is `offset` bytes beyond a multiple of 128."""
    dtype = DTYPES[storage]
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 128 + offset
    return memory[start : start + size].view(dtype).reshape(shape)


def _draw(rng: np.random.Generator, storage: str, *shape: int) -> Array:
    """Normal numbers, as well aligned as a planned buffer."""
    x = _at(storage, 0, *shape)
    x[...] = rng.standard_normal(shape).astype(np.float32)
    return x


def _wide(*arrays: Array) -> list[Array]:
    return [x.astype(np.float64) for x in arrays]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


@pytest.mark.parametrize(("storage", "result"), STORAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_products_of_any_orientation(
    rng: Any, storage: str, result: str, shape: tuple[int, int, int], turned: tuple[bool, bool]
) -> None:
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    rows, inner, columns = shape
    a = _draw(rng, storage, inner, rows).T if turned[0] else _draw(rng, storage, rows, inner)
    b = _draw(rng, storage, columns, inner).T if turned[1] else _draw(rng, storage, inner, columns)
    start = _draw(rng, result, rows, columns)
    wide_a, wide_b, wide_start = _wide(a, b, start)
    out = start.copy()
    for accumulate in (False, True):
        out[...] = start
        matmul(launcher, a, b, out, accumulate=accumulate)
        close("out", out, wide_a @ wide_b + accumulate * wide_start, storage=result, factor=1)
    assert stand_in.products == ["DEFAULT"] * 2
    assert stand_in.searches == 1, "adding to the result needs no other algorithm"


def test_a_plan_is_for_one_kind_of_product(rng: Any) -> None:
    """Square operands: nothing but what is asked tells products apart, and the stand-in knows its algorithms."""
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    small, large = ([_draw(rng, storage, 8, 8) for _ in "ab"] for storage in ("bfloat16", "float32"))
    vector, hidden = _draw(rng, "bfloat16", 8), _draw(rng, "bfloat16", 8, 8)
    for _ in range(2):
        for a, b in (small, large):
            for turned_a, turned_b in ((a, b), (a.T, b), (a, b.T), (a.T, b.T)):
                out = _at("float32", 0, 8, 8)
                matmul(launcher, turned_a, turned_b, out)
                close("out", out, turned_a.astype(np.float64) @ turned_b, storage="float32", factor=8)
        for launcher.tf32 in (True, False):
            matmul(launcher, *large, _at("float32", 0, 8, 8))
        kinds: list[Kind] = ["none", "bias", "gelu", "gelu gradient", "bias gradient"]
        for kind in kinds:
            aux = hidden if "gelu" in kind else None
            given = Epilogue(kind, None if kind == "none" else vector, aux)
            assert matmul_with(launcher, *small, _at("bfloat16", 0, 8, 8), given)
            if aux is not None:
                assert matmul_with(launcher, *small, _at("bfloat16", 0, 8, 8), Epilogue(kind, None, aux))
    assert stand_in.searches == 4 + 4 + 1 + 7
    assert len(stand_in.products) == 2 * (8 + 2 + 7)


@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bias_is_an_epilogue(rng: Any, storage: str, shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    stand_in = StandIn()
    x, weight, bias = (_draw(rng, storage, *s) for s in ((rows, inner), (columns, inner), (columns,)))
    out, want = np.zeros((rows, columns), x.dtype), np.zeros((rows, columns))
    linear_forward(launcher_with(stand_in), x, weight, bias, out)
    reference_linear.linear_forward(np, *_wide(x, weight, bias), want)
    close("out", out, want, storage=storage, factor=1)
    assert stand_in.products == ["BIAS"]


@pytest.mark.parametrize(("storage", "gradient"), STORAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_bias_gradient_is_an_epilogue(
    rng: Any, storage: str, gradient: str, shape: tuple[int, int, int], accumulate: bool
) -> None:
    """Where it sums more than one row, and what is added to is float32; elsewhere it is column_sum.cu's."""
    rows, inner, columns = shape
    fused = rows > 1 and not (accumulate and gradient == "bfloat16")
    stand_in = StandIn()
    launcher = launcher_with(stand_in, kernels=NoKernel if fused and not accumulate else simulator_or_skip())
    dout, x, weight = (_draw(rng, storage, *s) for s in ((rows, columns), (rows, inner), (columns, inner)))
    got = np.zeros_like(x), _draw(rng, gradient, columns, inner), _draw(rng, gradient, columns)
    wants = _wide(*got)
    linear_backward(launcher, dout, x, weight, *got, accumulate=accumulate)
    reference_linear.linear_backward(np, *_wide(dout, x, weight), *wants, accumulate=accumulate)
    for name, ours, theirs, kind in zip(
        ("dx", "dweight", "dbias"), got, wants, (storage, gradient, gradient), strict=True
    ):
        close(name, ours, theirs, storage=kind, factor=2 if fused or name != "dbias" else 2 + rows)
    assert stand_in.products == ["BGRADB" if fused else "DEFAULT", "DEFAULT"]


class _Mlp:
    """Operands of an MLP; `storage` of activations and weights, `gradient` of the parameters' gradients."""

    def __init__(self, rng: Any, storage: str, gradient: str, sizes: tuple[int, int, int], *, biased: bool) -> None:
        n, c, m = sizes
        self.x, self.dout = _draw(rng, storage, n, c), _draw(rng, storage, n, c)
        self.up, self.down = _draw(rng, storage, m, c), _draw(rng, storage, c, m)
        self.up_bias, self.down_bias = (_draw(rng, storage, k) if biased else None for k in (m, c))
        self.kept = [_at(storage, 0, n, m) for _ in range(2)]
        self.out = _at(storage, 0, n, c)
        self.activations = [np.full((n, k), np.nan, self.x.dtype) for k in (m, c)]
        shapes = ((m, c), (m,), (c, m), (c,))
        self.gradients = [_draw(rng, gradient, *s) if biased or len(s) > 1 else None for s in shapes]

    def forward(self, operation: Any, first: Any, *, wide: bool = False) -> list[Array]:
        """hidden, activated, out."""
        given = [self.x, self.up, self.up_bias, self.down, self.down_bias]
        results = [*self.kept, self.out]
        if wide:
            given = [None if x is None else x.astype(np.float64) for x in given]
            results = [np.empty(x.shape) for x in results]
        operation(first, *given, *results)
        return results

    def backward(self, operation: Any, first: Any, *, wide: bool, accumulate: bool) -> list[Array | None]:
        """dhidden, dx and the gradients of the parameters, from what is kept."""
        given = [self.dout, self.x, *self.kept, self.up, self.down]
        results = [*self.activations, *self.gradients]
        if wide:
            given = [x.astype(np.float64) for x in given]
            results = [None if x is None else x.astype(np.float64) for x in results]
        operation(first, *given, *results, accumulate=accumulate)
        return results


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("sizes", [(1, 3, 8), (37, 19, 24), (6, 16, 40)], ids=str)
def test_gelu_is_an_epilogue(rng: Any, sizes: tuple[int, int, int], biased: bool) -> None:
    """bf16: hidden and activated are rounded once, and out is made of the rounded activations."""
    stand_in = StandIn()
    problem = _Mlp(rng, "bfloat16", "bfloat16", sizes, biased=biased)
    hidden, activated, out = problem.forward(mlp_forward, launcher_with(stand_in))
    wants = problem.forward(reference_mlp.mlp_forward, np, wide=True)
    close("hidden", hidden, wants[0], storage="bfloat16", factor=1)
    close("activated", activated, wants[1], storage="bfloat16", factor=1)
    again = np.empty(out.shape)
    bias = None if problem.down_bias is None else problem.down_bias.astype(np.float64)
    reference_linear.linear_forward(np, *_wide(activated, problem.down), bias, again)
    close("out", out, again, storage="bfloat16", factor=1)
    wanted = ["GELU_AUX_BIAS", "BIAS"] if biased else ["GELU_AUX", "DEFAULT"]
    assert stand_in.products == wanted


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_gradient_of_gelu_is_an_epilogue(rng: Any, gradient: str, biased: bool, accumulate: bool) -> None:
    """Its bias's gradient too where it is not added to; a float32 one, of bf16 activations, goes with the weight's.

    A bfloat16 one that is added to is a kernel's own: it would be rounded twice.
    """
    sizes = (37, 19, 24)
    stand_in = StandIn()
    problem = _Mlp(rng, "bfloat16", gradient, sizes, biased=biased)
    problem.forward(mlp_forward, launcher_with(stand_in))
    stand_in.products.clear()
    starts = [None if x is None else x.astype(np.float64) for x in (*problem.activations, *problem.gradients)]
    wants = problem.backward(reference_mlp.mlp_backward, np, wide=True, accumulate=accumulate)
    kernels = simulator_or_skip() if accumulate and biased else NoKernel
    got = problem.backward(mlp_backward, launcher_with(stand_in, kernels=kernels), wide=False, accumulate=accumulate)
    both = gradient == "bfloat16" and biased and not accumulate
    fused = "BGRADB" if biased and not (accumulate and gradient == "bfloat16") else "DEFAULT"
    hidden = "DGELU_BGRAD" if both else "DGELU"
    assert stand_in.products == [fused, hidden, "DEFAULT" if both else fused, "DEFAULT"]
    close("dhidden", got[0], wants[0], storage="bfloat16", factor=1)
    # what follows is made of dhidden as it was rounded, but for a bias's gradient of the same kernel
    dhidden, rest = got[0].astype(np.float64), None if both else starts[3]
    wants[1:4] = np.empty(problem.x.shape), starts[2], wants[3] if both else rest
    given = (dhidden, *_wide(problem.x, problem.up))
    reference_linear.linear_backward(np, *given, *wants[1:3], rest, accumulate=accumulate)
    names = ("dx", "dup_weight", "dup_bias", "ddown_weight", "ddown_bias")
    for name, ours, theirs in zip(names, got[1:], wants[1:], strict=True):
        assert (ours is None) == (theirs is None) == (not biased and name.endswith("bias"))
        if ours is not None:
            close(name, ours, theirs, storage="bfloat16" if name == "dx" else gradient, factor=2 + sizes[0])


@pytest.mark.parametrize(
    ("storage", "gelu", "width"), [("float32", True, 24), ("bfloat16", False, 24), ("bfloat16", True, 20)]
)
def test_where_gelu_is_a_kernel_of_its_own(rng: Any, storage: str, gelu: bool, width: int) -> None:
    """In float32, on cards whose epilogue is slow, and in rows that are no multiple of 8: products stay cuBLASLt's."""
    stand_in = StandIn()
    launcher = launcher_with(stand_in, gelu=gelu, kernels=simulator_or_skip())
    problem = _Mlp(rng, storage, storage, (9, 19, width), biased=True)
    got = problem.forward(mlp_forward, launcher)
    wants = problem.forward(reference_mlp.mlp_forward, np, wide=True)
    for name, ours, theirs in zip(("hidden", "activated", "out"), got, wants, strict=True):
        close(name, ours, theirs, storage=storage, factor=30 if storage == "float32" else 2.0**16)
    wants = problem.backward(reference_mlp.mlp_backward, np, wide=True, accumulate=False)
    results = problem.backward(mlp_backward, launcher, wide=False, accumulate=False)
    for ours, theirs in zip(results, wants, strict=True):
        assert ours is not None
        close("gradient", ours, theirs, storage=storage, factor=60 if storage == "float32" else 2.0**15)
    assert stand_in.products == ["DEFAULT", "BIAS", "BGRADB", "DEFAULT", "DEFAULT", "DEFAULT"]
    assert launcher.lt is not None
    assert not launcher.lt.refused, "it was not even asked for"


def test_a_plan_is_made_once_and_takes_the_arrays_of_each_call(rng: Any) -> None:
    """Layers of one shape share a plan; so the second call must not use the first one's pointers."""
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    for problem in [_Mlp(rng, "bfloat16", "bfloat16", (8, 16, 24), biased=True) for _ in range(3)]:
        got = problem.forward(mlp_forward, launcher)
        wants = problem.forward(reference_mlp.mlp_forward, np, wide=True)
        close("hidden", got[0], wants[0], storage="bfloat16", factor=1)
        close("activated", got[1], wants[1], storage="bfloat16", factor=1)
    assert len(stand_in.products) == 6
    assert stand_in.searches == 2, "one for each of the two products"


def test_an_array_that_lies_worse_has_a_plan_of_its_own() -> None:
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    b = _at("bfloat16", 0, 16, 8)
    for offset, plans in ((0, 1), (0, 1), (2, 2), (64, 3), (2, 3), (0, 3)):
        matmul(launcher, _at("bfloat16", offset, 4, 16), b, _at("bfloat16", 0, 4, 8))
        assert stand_in.searches == plans
    weight, hidden, out = (_at("bfloat16", 0, *s) for s in ((16, 8), (4, 8), (4, 8)))
    for offset, plans in ((0, 4), (2, 5), (0, 5)):
        bias = _at("bfloat16", offset, 8)
        assert matmul_with(launcher, _at("bfloat16", 0, 4, 16), weight, out, Epilogue("gelu", bias, hidden))
        assert stand_in.searches == plans


@pytest.mark.parametrize("silent", [False, True])
def test_an_epilogue_that_is_refused_is_done_by_our_kernels(rng: Any, silent: bool) -> None:
    """Refused once, by an error or by an empty list, and never asked for again; nothing is left behind."""
    stand_in = StandIn(lacks=frozenset({"GELU_AUX_BIAS", "DGELU", "DGELU_BGRAD", "BGRADB", "BIAS"}), silent=silent)
    launcher = launcher_with(stand_in, kernels=simulator_or_skip())
    lt = launcher.lt
    assert lt is not None
    problem = _Mlp(rng, "bfloat16", "bfloat16", (9, 19, 24), biased=True)
    counts = []
    for _ in range(2):
        got = problem.forward(mlp_forward, launcher)
        wants = problem.forward(reference_mlp.mlp_forward, np, wide=True)
        for ours, theirs in zip(got, wants, strict=True):
            close("forward", ours, theirs, storage="bfloat16", factor=2.0**16)
        results = problem.backward(mlp_backward, launcher, wide=False, accumulate=False)
        wants = problem.backward(reference_mlp.mlp_backward, np, wide=True, accumulate=False)
        for ours, theirs in zip(results, wants, strict=True):
            assert ours is not None
            close("backward", ours, theirs, storage="bfloat16", factor=2.0**16)
        counts.append(stand_in.searches)
    assert counts[1] == counts[0]
    assert stand_in.products == ["DEFAULT"] * 12
    assert [reason for reason in lt.refused.values() if ("no algorithm" if silent else "NOT_SUPPORTED") in reason]
    refused = {name for name in stand_in.lacks if any(f"'{name}'" in problem for problem in lt.refused)}
    assert refused == stand_in.lacks
    left = 1 + 4 * (stand_in.searches - len(lt.refused))
    assert len(stand_in.objects) == left, "the handle; an operation and three layouts for each plan"


def test_a_product_that_is_refused_altogether_is_the_hosts(rng: Any) -> None:
    stand_in = StandIn(lacks=frozenset({"DEFAULT"}))
    a, b, out = _draw(rng, "float32", 4, 5), _draw(rng, "float32", 5, 6), np.zeros((4, 6), np.float32)
    matmul(launcher_with(stand_in), a, b, out)
    close("out", out, a.astype(np.float64) @ b, storage="float32", factor=5)
    assert stand_in.products == []


def test_rules_that_need_no_search(rng: Any) -> None:
    """What is known beforehand is not asked: no search, and no plan."""
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    a, b, out = (_draw(rng, "bfloat16", *s) for s in ((4, 16), (16, 8), (4, 8)))
    vector, hidden = _draw(rng, "bfloat16", 8), _draw(rng, "bfloat16", 4, 8)
    single = _draw(rng, "bfloat16", 1, 4).T, _draw(rng, "bfloat16", 1, 8)
    wide = vector.astype(np.float32)
    assert not matmul_with(launcher, a, b, out, Epilogue("bias", wide))
    assert not matmul_with(launcher, a, b, out, Epilogue("gelu", vector, hidden.astype(np.float32)))
    assert not matmul_with(launcher, a, b, out, Epilogue("gelu", vector, np.asfortranarray(hidden)))
    assert not matmul_with(launcher, *single, out, Epilogue("bias gradient", vector[:4]))
    assert stand_in.searches == 0
    lt = launcher.lt
    assert lt is not None
    with pytest.raises(ValueError, match="a product with the epilogue bias does not accumulate"):
        lt.matmul(a, b, out, compute=68, workspace=None, stream=0, accumulate=True, epilogue=Epilogue("bias", vector))


def test_nothing_is_asked_for_an_empty_product() -> None:
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    out = np.full((3, 2), 7, np.float32)
    matmul(launcher, np.zeros((3, 0), np.float32), np.zeros((0, 2), np.float32), out)
    assert not out.any()
    matmul(launcher, np.zeros((0, 4), np.float32), np.zeros((4, 2), np.float32), np.zeros((0, 2), np.float32))
    assert stand_in.searches == 0


@pytest.mark.parametrize(("storage", "wanted"), [("float32", lt_stand_in.COMPUTE_32F_FAST_TF32), ("bfloat16", 68)])
def test_tf32_is_for_float32(storage: str, wanted: int, rng: Any) -> None:
    stand_in = StandIn()
    launcher = launcher_with(stand_in)
    launcher.tf32 = True
    a, b = _draw(rng, storage, 4, 5), _draw(rng, storage, 5, 6)
    matmul(launcher, a, b, np.zeros((4, 6), a.dtype))
    assert [x.compute_type for x in stand_in.objects.values() if isinstance(x, lt_stand_in.Operation)] == [wanted]


def test_the_workspace_is_one_array(rng: Any) -> None:
    launcher = launcher_with(StandIn())
    first = launcher.scratch("cublaslt", (WORKSPACE_BYTES,), "uint8")
    matmul(launcher, _draw(rng, "float32", 4, 5), _draw(rng, "float32", 5, 6), np.zeros((4, 6), np.float32))
    assert first[0] == 0xFF, "the stand-in writes there"
