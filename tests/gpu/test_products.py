"""Matrix products of GPT-2's sizes on a GPU, through cuBLASLt and without it, and a layer in a captured graph.

Bounds are those of test_operations.py; the reference runs in float64 on the same device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu_check.launch_all import CountingLauncher
from bench.kernels.cases import DTYPES, ODD, SMALL, BoundCase, Sizes
from bench.kernels.operation_cases import cuda_side, make_case
from cllm_gpu.ops.cuda.cublaslt import GELU_GENERATIONS
from cllm_gpu.ops.cuda.cupy_launcher import gpu_launcher
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward
from cllm_gpu.ops.cuda.mlp import mlp_backward, mlp_forward
from tests.gpu.test_operations import check_case
from tests.ops.cuda.devices import Device

pytestmark = pytest.mark.gpu
GPT2 = Sizes(batch=1, length=1024, width=768, mlp_width=3072)
QKV = Sizes(batch=1, length=1024, width=768, mlp_width=2304)
OPERATIONS = ("linear_forward", "linear_backward", "mlp_forward", "mlp_backward")


def _device(launcher: Launcher) -> Device:
    return Device(launcher, launcher.xp.asarray, launcher.xp.asnumpy)


@pytest.fixture(scope="module")
def with_lt() -> Device:
    """cuBLASLt; not run, and said so, where nvmath-python is not there."""
    import cupy

    launcher, line = gpu_launcher(cupy)
    if launcher.lt is None:
        pytest.skip(f"not run: {line}")
    return _device(launcher)


@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("sizes", [GPT2, QKV], ids=["mlp", "qkv"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_products_of_gpt2_through_cublaslt(with_lt: Device, name: str, sizes: Sizes, storage: str) -> None:
    check_case(with_lt, make_case(name, storage, sizes), storage=storage)
    lt = with_lt.launcher.lt
    assert lt is not None
    assert not lt.refused, "cuBLASLt has an algorithm for each"


@pytest.mark.parametrize("name", ["linear_backward", "mlp_backward"])
def test_float32_gradients_of_bf16_layers_through_cublaslt(with_lt: Device, name: str) -> None:
    """As where micro-batches add to them: products of bf16 into float32 that accumulate, biases' gradients inside."""
    case = make_case(name, "bfloat16", GPT2)
    operands = {key: x.astype(np.float32) if key in case.updated else x for key, x in case.operands.items()}
    check_case(with_lt, dataclasses.replace(case, operands=operands), storage="bfloat16")
    assert with_lt.launcher.lt is not None
    assert not with_lt.launcher.lt.refused, "cuBLASLt has an algorithm for each"


@pytest.mark.parametrize("storage", list(DTYPES))
@pytest.mark.parametrize("sizes", [SMALL, ODD, GPT2], ids=["small", "odd", "mlp"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_products_without_cublaslt(name: str, sizes: Sizes, storage: str) -> None:
    import cupy

    check_case(_device(Launcher(cupy, cupy.RawModule)), make_case(name, storage, sizes), storage=storage)


def _arrays(cupy: Any, *shapes: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(2)
    dtype = DTYPES["bfloat16"]
    return [cupy.asarray(rng.standard_normal(s, np.float32).astype(dtype)) for s in shapes]


class _Step:
    """Forward and backward of an MLP and of a linear layer of GPT-2's sizes in bf16; all buffers are there before."""

    def __init__(self, launcher: Launcher, rows: int = 1024, width: int = 768, hidden: int = 3072) -> None:
        n, c, m = rows, width, hidden
        weights = ((m, c), (m,), (c, m), (c,))
        arrays = _arrays(launcher.xp, (n, c), *weights, (n, c), (n, m), (n, m), (n, c), (n, m), (n, c), *weights)
        self.launcher = launcher
        self.x, *self.weights, self.dout = arrays[:6]
        self.hidden, self.activated, self.out, self.dhidden, self.dx, *self.gradients = arrays[6:]

    def run(self) -> None:
        """Everything once."""
        up, _, down, bias = self.weights
        mlp_forward(self.launcher, self.x, *self.weights, self.hidden, self.activated, self.out)
        mlp_backward(
            self.launcher, self.dout, self.x, self.hidden, self.activated, up, down, self.dhidden, self.dx,
            *self.gradients, accumulate=False,
        )  # fmt: skip
        linear_forward(self.launcher, self.activated, down, bias, self.out)
        linear_backward(
            self.launcher, self.out, self.activated, down, self.dhidden, *self.gradients[2:], accumulate=True
        )

    def results(self) -> list[Any]:
        """What it writes."""
        return [self.hidden, self.activated, self.out, self.dhidden, self.dx, *self.gradients]

    def poison(self) -> None:
        """Not a number everywhere."""
        for x in self.results():
            x.view("uint8")[...] = 0xFF


def test_bf16_layers_launch_no_kernel_of_ours(with_lt: Device) -> None:
    """Where the card's GELU epilogue is taken, a step that does not accumulate is cuBLASLt's alone."""
    cupy = with_lt.launcher.xp
    major = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["major"]
    if major not in GELU_GENERATIONS:
        pytest.skip(f"not run: GELU is a kernel of its own on compute capability {major}.x")
    launcher = CountingLauncher(cupy, cupy.RawModule)
    launcher.lt = with_lt.launcher.lt
    step = _Step(launcher)
    up, _, down, _ = step.weights
    mlp_forward(launcher, step.x, *step.weights, step.hidden, step.activated, step.out)
    mlp_backward(
        launcher, step.dout, step.x, step.hidden, step.activated, up, down, step.dhidden, step.dx, *step.gradients,
        accumulate=False,
    )  # fmt: skip
    assert not launcher.launches


def test_a_captured_graph_gives_the_same_bits(with_lt: Device) -> None:
    """cuBLASLt's products and our kernels can be captured: CuPy's own cuBLAS calls cannot."""
    cupy = with_lt.launcher.xp
    step = _Step(with_lt.launcher)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        step.poison()
        step.run()
        stream.synchronize()
        wanted = [x.copy() for x in step.results()]
        stream.begin_capture()
        step.run()
        graph = stream.end_capture()
        for _ in range(3):
            step.poison()
            graph.launch(stream)
            stream.synchronize()
            for got, want in zip(step.results(), wanted, strict=True):
                assert bool((got.view("uint16") == want.view("uint16")).all())


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_bits_through_a_second_handle(with_lt: Device, name: str) -> None:
    """The algorithm is a function of the problem: another process, here another handle, takes the same one."""
    case = make_case(name, "bfloat16", GPT2)
    first, second = (_results(case, launcher, with_lt.put) for launcher in (with_lt.launcher, _again(with_lt)))
    for key, x in first.items():
        assert bool((x.view("uint16") == second[key].view("uint16")).all()), key


def _again(device: Device) -> Launcher:
    return gpu_launcher(device.launcher.xp)[0]


def _results(case: Any, launcher: Launcher, put: Callable[[Any], Any]) -> dict[str, Any]:
    bound = BoundCase(case, cuda_side(case, launcher), put)
    bound.reset()
    bound.call()
    return bound.results()
