"""Benchmarks of layer norm, cross-entropy and GELU in bf16: ours, and PyTorch's, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.kernels import counts
from bench.kernels.jobs import Job
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide
from cllm_gpu.ops.cuda.cross_entropy import cross_entropy
from cllm_gpu.ops.cuda.gelu import gelu_backward, gelu_forward
from cllm_gpu.ops.cuda.layernorm import layernorm_backward, layernorm_forward, residual_layernorm_forward

EPSILON = 1e-5
BF16 = 2


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm of N rows of C: alone, after the residual addition, and the backward of the latter."""

    rows: int
    columns: int
    name: str = "layer norm"

    @property
    def needs_bytes(self) -> int:
        return 20 * BF16 * self.rows * self.columns

    def _job(self, kernel: str, side: str, passes: int, call: Any, result: Any) -> Job:
        amount = counts.passes_bytes(self.rows * self.columns, BF16, passes)
        return Job(kernel, side, {"N": self.rows, "C": self.columns}, call, float(amount), "TB/s", result)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        shape, vector = (self.rows, self.columns), (self.columns,)
        x, branch, dout, dresidual = (device.random(shape, "bfloat16", seed) for seed in range(4))
        weight, bias = (device.random(vector, "bfloat16", seed) for seed in (4, 5))
        yield from self._ours(device, x, branch, dout, dresidual, weight, bias)
        if torch is None:
            return
        norm = self._norm(torch)
        leaves = [torch.leaf(array) for array in (x, branch, weight, bias)]
        for side, function in torch.versions(norm):
            yield self._forward("layer norm forward", side, 2, torch, function, (leaves[0], *leaves[2:]))
        behind = lambda r, b, w, c: ((h := r + b), norm(h, w, c))  # noqa: E731
        given = [torch.give(dresidual), torch.give(dout)]
        for side, function in torch.versions(behind):
            yield self._forward("residual + layer norm forward", side, 4, torch, function, leaves)
            yield self._backward(side, torch, function, leaves, given)

    def _norm(self, torch: TorchSide) -> Callable[..., Any]:
        columns = (self.columns,)
        return lambda x, w, b: torch.functional.layer_norm(x, columns, w, b, EPSILON)

    def _ours(
        self, device: Device, x: Any, branch: Any, dout: Any, dresidual: Any, weight: Any, bias: Any
    ) -> Iterator[Job]:
        out, stream, dx = (device.empty(x.shape, "bfloat16") for _ in range(3))
        mean, rstd = (device.empty((self.rows,), "float32") for _ in range(2))
        dweight, dbias = (device.empty(weight.shape, "bfloat16") for _ in range(2))
        run = device.launcher

        def forward() -> None:
            layernorm_forward(run, x, weight, bias, out, mean, rstd, epsilon=EPSILON)

        def behind() -> None:
            residual_layernorm_forward(
                run, x, branch, weight, bias, stream, out, mean, rstd, epsilon=EPSILON, dropout=None
            )

        def backward() -> None:
            layernorm_backward(
                run, dout, stream, weight, mean, rstd, dresidual, dx, None, dweight, dbias,
                accumulate=False, dropout=None,
            )  # fmt: skip

        yield self._job("layer norm forward", "ours", 2, forward, lambda: out)
        yield self._job("residual + layer norm forward", "ours", 4, behind, lambda: out)
        yield self._job("residual + layer norm backward", "ours", 4, backward, lambda: dx)

    def _forward(self, kernel: str, side: str, passes: int, torch: TorchSide, function: Any, inputs: Any) -> Job:
        kept: dict[str, Any] = {}

        def call() -> None:
            kept["out"] = function(*inputs)

        last = lambda: kept["out"][-1] if isinstance(kept["out"], tuple) else kept["out"]  # noqa: E731
        return self._job(kernel, side, passes, call, lambda: torch.take(last()))

    def _backward(self, side: str, torch: TorchSide, function: Any, leaves: list[Any], given: list[Any]) -> Job:
        """The gradients of residual stream, weight and bias; that of the branch equals the stream's."""
        kept: dict[str, Any] = {}
        wanted = [leaves[0], *leaves[2:]]

        def call() -> None:
            if "outputs" not in kept:
                kept["outputs"] = function(*leaves)
            kept["gradients"] = torch.torch.autograd.grad(kept["outputs"], wanted, given, retain_graph=True)

        kernel = "residual + layer norm backward"
        return self._job(kernel, side, 4, call, lambda: torch.take(kept["gradients"][0]))


@dataclass(frozen=True)
class CrossEntropy:
    """Losses and gradient of the logits, N rows of V; torch computes with float32 logits, as with autocast."""

    rows: int
    columns: int
    name: str = "cross-entropy"

    @property
    def needs_bytes(self) -> int:
        return 24 * self.rows * self.columns

    def _job(self, side: str, call: Any, result: Any, **more: Any) -> Job:
        amount = counts.passes_bytes(self.rows * self.columns, BF16, 2)
        size = {"N": self.rows, "V": self.columns}
        return Job("cross-entropy", side, size, call, float(amount), "TB/s", result, **more)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        pristine = device.random((self.rows, self.columns), "bfloat16")
        logits = pristine.copy()
        losses = device.empty((self.rows,), "float32")
        targets = (device.xp.arange(self.rows) * 7919 % self.columns).astype("int32")

        def call() -> None:
            cross_entropy(device.launcher, logits, targets, losses, ignore_index=-1, gradient_scale=1.0 / self.rows)

        def restore() -> None:
            logits[...] = pristine

        yield self._job("ours", call, lambda: logits, prepare=restore)
        if torch is None:
            return
        loss = lambda x, t: torch.functional.cross_entropy(x.float(), t)  # noqa: E731
        leaf, wanted = torch.leaf(pristine), torch.give(targets.astype("int64"))
        for side, function in torch.versions(loss):
            yield self._torch(torch, side, function, leaf, wanted)

    def _torch(self, torch: TorchSide, side: str, function: Any, logits: Any, targets: Any) -> Job:
        kept: dict[str, Any] = {}

        def call() -> None:
            kept["gradient"] = torch.torch.autograd.grad(function(logits, targets), logits)[0]

        return self._job(side, call, lambda: torch.take(kept["gradient"]))


@dataclass(frozen=True)
class Gelu:
    """GELU (tanh) of N rows of M plus a bias, and its backward with the bias's gradient."""

    rows: int
    columns: int
    name: str = "GELU"

    @property
    def needs_bytes(self) -> int:
        return 16 * BF16 * self.rows * self.columns

    def _job(self, direction: str, side: str, call: Any, result: Any, **more: Any) -> Job:
        amount = counts.passes_bytes(self.rows * self.columns, BF16, 3)
        size = {"N": self.rows, "M": self.columns}
        return Job(f"GELU {direction}", side, size, call, float(amount), "TB/s", result, **more)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        shape = (self.rows, self.columns)
        x, dout = (device.random(shape, "bfloat16", seed) for seed in (1, 2))
        bias = device.random((self.columns,), "bfloat16", 3)
        yield from self._ours(device, x, bias, dout)
        if torch is None:
            return
        gelu = lambda x, b: torch.functional.gelu(x + b, approximate="tanh")  # noqa: E731
        leaves, given = [torch.leaf(x), torch.leaf(bias)], torch.give(dout)
        for side, function in torch.versions(gelu):
            yield from self._torch(torch, side, function, leaves, given)

    def _ours(self, device: Device, x: Any, bias: Any, dout: Any) -> Iterator[Job]:
        h, out = x.copy(), device.empty(x.shape, "bfloat16")
        dx, dbias = device.empty(x.shape, "bfloat16"), device.empty(bias.shape, "bfloat16")

        def restore() -> None:
            h[...] = x

        def forward() -> None:
            gelu_forward(device.launcher, h, bias, out)

        def backward() -> None:
            gelu_backward(device.launcher, dout, h, dx, dbias, accumulate=False)

        yield self._job("forward", "ours", forward, lambda: out, prepare=restore)
        restore()
        forward()  # h = x + bias, the input of the backward
        yield self._job("backward", "ours", backward, lambda: dx)

    def _torch(self, torch: TorchSide, side: str, function: Any, leaves: Any, given: Any) -> Iterator[Job]:
        kept: dict[str, Any] = {}

        def forward() -> None:
            kept["out"] = function(*leaves)

        def backward() -> None:
            kept["gradients"] = torch.torch.autograd.grad(kept["out"], leaves, given, retain_graph=True)

        yield self._job("forward", side, forward, lambda: torch.take(kept["out"]))
        yield self._job("backward", side, backward, lambda: torch.take(kept["gradients"][0]))


def full_problems() -> list[Any]:
    """GPT-2 124M at 64·1024 tokens; the logits of a quarter of them, with the vocabulary padded to 50,304."""
    return [LayerNorm(65536, 768), CrossEntropy(16384, 50304), Gelu(65536, 3072)]


def rehearsal_problems() -> list[Any]:
    """The same at sizes that a CPU computes in seconds."""
    return [LayerNorm(9, 40), CrossEntropy(5, 72), Gelu(7, 48)]
