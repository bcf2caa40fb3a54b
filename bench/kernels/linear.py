"""Benchmarks of the linear layers of a GPT in bf16, with biases, GELU and gradients: ours, and PyTorch's.

"ours" fuses epilogues into the matrix products if cuBLASLt is available; "ours, separate kernels" uses cuBLAS's gemmEx
and our kernels for biases, GELU and sums. Without nvmath-python both are the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.kernels import counts
from bench.kernels.jobs import Job
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward
from cllm_gpu.ops.cuda.mlp import mlp_backward, mlp_forward

BF16 = 2
SEPARATE = "ours, separate kernels"


def _launchers(device: Device) -> Iterator[tuple[str, Launcher]]:
    yield "ours", device.launcher
    yield SEPARATE, device.separate


@dataclass(frozen=True)
class TorchLayer:
    """A layer in PyTorch: its forward, and the gradients of all inputs from dout."""

    torch: TorchSide
    function: Callable[..., Any]
    inputs: list[Any]
    dout: Any

    def sides(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """(side, forward, its result, backward, the gradient of the first input)."""
        leaves, given = [self.torch.leaf(x) for x in self.inputs], self.torch.give(self.dout)
        for side, function in self.torch.versions(self.function):
            yield self._side(side, function, leaves, given)

    def _side(self, side: str, function: Any, leaves: list[Any], given: Any) -> tuple[str, Any, Any, Any, Any]:
        kept: dict[str, Any] = {}

        def forward() -> None:
            kept["out"] = function(*leaves)

        def backward() -> None:
            if "out" not in kept:
                forward()
            kept["gradients"] = self.torch.torch.autograd.grad(kept["out"], leaves, given, retain_graph=True)

        result = lambda: self.torch.take(kept["out"])  # noqa: E731
        gradient = lambda: self.torch.take(kept["gradients"][0])  # noqa: E731
        return side, forward, result, backward, gradient


@dataclass(frozen=True)
class Linear:
    """A linear layer K → M on N rows, with a bias, or without one like the output head."""

    rows: int
    inputs: int
    outputs: int
    biased: bool = True

    @property
    def name(self) -> str:
        return f"linear {self.inputs} to {self.outputs}"

    @property
    def needs_bytes(self) -> int:
        return 6 * BF16 * (self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs)

    def _job(self, direction: str, side: str, call: Any, result: Any) -> Job:
        products = 1 if direction == "forward" else 2
        amount = products * counts.matmul_flops(self.rows, self.outputs, self.inputs)
        size = {"N": self.rows, "K": self.inputs, "M": self.outputs}
        return Job(f"linear {direction}", side, size, call, amount, "TFLOP/s", result)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        n, k, m = self.rows, self.inputs, self.outputs
        x, weight, dout = (device.random(s, "bfloat16", i) for i, s in enumerate(((n, k), (m, k), (n, m))))
        bias = device.random((m,), "bfloat16", 3) if self.biased else None
        yield from self._ours(device, x, weight, bias, dout)
        if torch is None:
            return
        layer = TorchLayer(torch, torch.functional.linear, [y for y in (x, weight, bias) if y is not None], dout)
        for side, forward, result, backward, gradient in layer.sides():
            yield self._job("forward", side, forward, result)
            yield self._job("backward", side, backward, gradient)

    def _ours(self, device: Device, x: Any, weight: Any, bias: Any, dout: Any) -> Iterator[Job]:
        out, dx, dweight = (device.empty(y.shape, "bfloat16") for y in (dout, x, weight))
        dbias = None if bias is None else device.empty(bias.shape, "bfloat16")
        for side, launcher in _launchers(device):

            def forward(launcher: Launcher = launcher) -> None:
                linear_forward(launcher, x, weight, bias, out)

            def backward(launcher: Launcher = launcher) -> None:
                linear_backward(launcher, dout, x, weight, dx, dweight, dbias, accumulate=False)

            yield self._job("forward", side, forward, lambda: out)
            yield self._job("backward", side, backward, lambda: dx)


@dataclass(frozen=True)
class Mlp:
    """An MLP on N rows: C → M, GELU, M → C, both layers with biases."""

    rows: int
    width: int
    hidden: int

    @property
    def name(self) -> str:
        return f"MLP {self.width} to {self.hidden}"

    @property
    def needs_bytes(self) -> int:
        return 8 * BF16 * (self.rows * (self.width + self.hidden) + self.width * self.hidden)

    def _job(self, direction: str, side: str, call: Any, result: Any) -> Job:
        products = 2 if direction == "forward" else 4
        amount = products * counts.matmul_flops(self.rows, self.hidden, self.width)
        size = {"N": self.rows, "C": self.width, "M": self.hidden}
        return Job(f"MLP {direction}", side, size, call, amount, "TFLOP/s", result)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        n, c, m = self.rows, self.width, self.hidden
        shapes = ((n, c), (m, c), (m,), (c, m), (c,))
        inputs = [device.random(s, "bfloat16", i) for i, s in enumerate(shapes)]
        inputs[1] *= c**-0.5  # weights scaled so that hidden is near 1, where GELU is nonlinear
        dout = device.random((n, c), "bfloat16", 5)
        yield from self._ours(device, inputs, dout)
        if torch is None:
            return
        linear, gelu = torch.functional.linear, torch.functional.gelu
        function = lambda x, u, a, d, b: linear(gelu(linear(x, u, a), approximate="tanh"), d, b)  # noqa: E731
        for side, forward, result, backward, gradient in TorchLayer(torch, function, inputs, dout).sides():
            yield self._job("forward", side, forward, result)
            yield self._job("backward", side, backward, gradient)

    def _ours(self, device: Device, inputs: list[Any], dout: Any) -> Iterator[Job]:
        x, up, _, down, _ = inputs
        hidden, activated, dhidden = (device.empty((self.rows, self.hidden), "bfloat16") for _ in range(3))
        out, dx = (device.empty(x.shape, "bfloat16") for _ in range(2))
        gradients = [device.empty(y.shape, "bfloat16") for y in inputs[1:]]
        for side, launcher in _launchers(device):

            def forward(launcher: Launcher = launcher) -> None:
                mlp_forward(launcher, *inputs, hidden, activated, out)

            def backward(launcher: Launcher = launcher) -> None:
                mlp_backward(
                    launcher, dout, x, hidden, activated, up, down, dhidden, dx, *gradients, accumulate=False
                )  # fmt: skip

            yield self._job("forward", side, forward, lambda: out)
            yield self._job("backward", side, backward, lambda: dx)


def full_problems() -> list[Any]:
    """GPT-2 124M at 64·1024 tokens; the output head on a quarter of them, with the vocabulary padded to 50,304."""
    return [Linear(65536, 768, 2304), Mlp(65536, 768, 3072), Linear(16384, 768, 50304, biased=False)]


def rehearsal_problems() -> list[Any]:
    """The same at sizes that a CPU computes in seconds."""
    return [Linear(9, 24, 40), Mlp(9, 24, 40), Linear(9, 24, 40, biased=False)]
