"""Benchmarks of attention and AdamW, ours and PyTorch's, and of the ceilings: a copy and a matrix product."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.kernels import counts
from bench.kernels.jobs import COMPARED, Job
from bench.kernels.targets import LENGTHS, OURS, TORCH_ADAM
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide
from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.architecture import SIZES, Architecture
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.ops.cuda.adam import adam_step_on_device
from cllm_gpu.ops.cuda.attention import BackwardMethod, attention_backward, attention_forward
from cllm_gpu.ops.cuda.gemm import matmul
from cllm_gpu.optim.parameter_groups import parameter_groups, segments

COPY, GEMM = "copy ceiling", "GEMM ceiling"
GPT2_VOCABULARY = 50257
ADAM_OPTIONS: dict[str, Any] = {"rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1}


@dataclass(frozen=True)
class CopyCeiling:
    """A large device-to-device copy; bytes read plus bytes written."""

    size: int
    name: str = COPY

    @property
    def needs_bytes(self) -> int:
        return 2 * self.size

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        source = device.random((self.size // 4,), "float32")
        target = device.empty(source.shape, "float32")
        size = {"bytes": self.size}
        yield Job(COPY, "device copy", size, lambda: device.xp.copyto(target, source), 2.0 * self.size, "TB/s")


@dataclass(frozen=True)
class GemmCeiling:
    """A large square bf16 matrix product with the library that training uses."""

    size: int
    name: str = GEMM

    @property
    def needs_bytes(self) -> int:
        return 3 * 2 * self.size**2

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        n = self.size
        a, b = (device.random((n, n), "bfloat16", seed) for seed in (1, 2))
        out = device.empty((n, n), "bfloat16")
        flops = counts.matmul_flops(n, n, n)
        yield Job(GEMM, "cuBLAS", {"n": n}, lambda: matmul(device.launcher, a, b, out), flops, "TFLOP/s")


@dataclass(frozen=True)
class Attention:
    """Causal bf16 attention, forward and backward, operands (B, T, H, D)."""

    batch: int
    length: int
    heads: int
    head_size: int

    @property
    def name(self) -> str:
        return f"attention D={self.head_size} T={self.length}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.length, self.heads, self.head_size

    @property
    def needs_bytes(self) -> int:
        # ours 8 arrays and the fused backward's sums in fp32; torch's results and gradients of two backends
        return 26 * 2 * int(np.prod(self.shape))

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        q, k, v, dout = (device.random(self.shape, "bfloat16", seed) for seed in range(4))
        yield from self._ours(device, q, k, v, dout)
        for side, backend in torch.attention_backends() if torch else []:
            assert torch is not None
            yield from self._torch(torch, side, backend, (q, k, v), dout)

    def _job(self, direction: str, side: str, call: Any, result: Any) -> Job:
        count = counts.attention_forward_flops if direction == "forward" else counts.attention_backward_flops
        flops = count(self.batch, self.heads, self.length, self.head_size, causal=True)
        size = {"B": self.batch, "T": self.length, "H": self.heads, "D": self.head_size}
        return Job(f"attention {direction}", side, size, call, flops, "TFLOP/s", result)

    def _ours(self, device: Device, q: Any, k: Any, v: Any, dout: Any) -> Iterator[Job]:
        out, dq, dk, dv = (device.empty(self.shape, "bfloat16") for _ in range(4))
        lse = device.empty((self.batch, self.heads, self.length), "float32")
        options: dict[str, Any] = {"causal": True, "scale": self.head_size**-0.5}

        def forward() -> None:
            attention_forward(device.launcher, q, k, v, out, lse, **options)

        def backward(method: BackwardMethod) -> None:
            attention_backward(device.launcher, dout, q, k, v, out, lse, dq, dk, dv, method=method, **options)

        yield self._job("forward", "ours", forward, lambda: out)
        for method, side in OURS.items():
            call = functools.partial(backward, method)
            yield self._job("backward", side, call, lambda: _joined(device.xp, dq, dk, dv))

    def _torch(self, torch: TorchSide, side: str, backend: Any, inputs: Any, dout: Any) -> Iterator[Job]:
        q, k, v = (torch.give(x).transpose(1, 2).requires_grad_() for x in inputs)
        given = torch.give(dout).transpose(1, 2)
        kept: dict[str, Any] = {}

        def forward() -> None:
            kept["out"] = torch.attention(backend, q, k, v)

        def backward() -> None:
            if "out" not in kept:
                forward()  # if the forward failed, raise its error again
            kept["gradients"] = torch.torch.autograd.grad(kept["out"], (q, k, v), given, retain_graph=True)

        yield self._job("forward", side, forward, lambda: torch.take(kept["out"].transpose(1, 2)))
        arrays = lambda: (torch.take(x.transpose(1, 2)) for x in kept["gradients"])  # noqa: E731
        yield self._job("backward", side, backward, lambda: _joined(torch.xp, *arrays()))


def _joined(xp: Any, *arrays: Any) -> Any:
    """The first elements of several arrays, so that a comparison covers each."""
    return xp.concatenate([xp.ravel(x)[: COMPARED // 4] for x in arrays])


@dataclass(frozen=True)
class AdamW:
    """One AdamW step on all parameters of a model: separate tensors for torch, one flat array for ours."""

    model: str
    architecture: Architecture

    @property
    def name(self) -> str:
        return f"AdamW {self.model}"

    @property
    def needs_bytes(self) -> int:
        # ours 4 fp32 arrays, a bf16 gradient and copy; torch's parameters, moments and foreach's temporaries
        return (16 + 4 + 12 + 16) * Layout(parameter_specs(self.architecture), np.float32).size

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        layout = Layout(parameter_specs(self.architecture), np.float32)
        start, gradients = (device.random((layout.size,), "float32", seed) for seed in (1, 2))
        begin = start[:COMPARED].copy()
        state = [start.copy(), *(device.xp.zeros(layout.size, dtype="float32") for _ in range(2))]
        yield self._ours(device, layout, state, gradients, begin)
        small = gradients.astype("bfloat16")
        yield self._mixed(device, layout, state, small)
        del small, state
        for side, option in ((TORCH_ADAM, "fused"), ("torch foreach", "foreach")) if torch else ():
            assert torch is not None
            yield self._torch(torch, layout, side, option, start.copy(), gradients, begin)
            device.release()
            torch.release()

    def _job(self, side: str, layout: Layout, per_parameter: int, call: Any, result: Any) -> Job:
        size = {"model": self.model, "parameters": layout.count}
        return Job("AdamW", side, size, call, float(per_parameter * layout.count), "TB/s", result)

    def _ours(self, device: Device, layout: Layout, state: list[Any], gradients: Any, begin: Any) -> Job:
        steps, decayed = itertools.count(1), _decayed(layout)

        def call() -> None:
            adam_step_on_device(
                device.launcher, state[0], gradients, *state[1:], step=next(steps), decayed=decayed,
                decoupled=True, gradient_scale=1.0, **ADAM_OPTIONS,
            )  # fmt: skip

        return self._job("ours, float32", layout, counts.ADAM_FLOAT32, call, lambda: state[0][:COMPARED] - begin)

    def _mixed(self, device: Device, layout: Layout, state: list[Any], gradients: Any) -> Job:
        """As in bf16 training: with a clipping factor and a skip flag on the device, and a bf16 copy."""
        copy = device.empty((layout.size,), "bfloat16")
        clip, skip = device.xp.ones(1, dtype="float32"), device.xp.zeros(1, dtype="int32")
        steps, decayed = itertools.count(1), _decayed(layout)

        def call() -> None:
            adam_step_on_device(
                device.launcher, state[0], gradients, *state[1:], step=next(steps), decayed=decayed,
                decoupled=True, gradient_scale=1.0, copy=copy, clip=clip, skip=skip, **ADAM_OPTIONS,
            )  # fmt: skip

        return self._job("ours, bf16 gradient and copy", layout, counts.ADAM_BFLOAT16, call, None)

    def _torch(
        self, torch: TorchSide, layout: Layout, side: str, option: str, start: Any, gradients: Any, begin: Any
    ) -> Job:
        parameters = []
        flat, flat_gradients = torch.give(start), torch.give(gradients)
        for name, spec in layout.specs.items():
            part = slice(layout.offsets[name], layout.offsets[name] + spec.size)
            parameter = torch.torch.nn.Parameter(flat[part].view(spec.shape))
            parameter.grad = flat_gradients[part].view(spec.shape)
            parameters.append((parameter, spec.decayed))
        groups = [
            {"params": [p for p, decayed in parameters if decayed], "weight_decay": ADAM_OPTIONS["weight_decay"]},
            {"params": [p for p, decayed in parameters if not decayed], "weight_decay": 0.0},
        ]
        betas = (ADAM_OPTIONS["beta1"], ADAM_OPTIONS["beta2"])
        optimizer = torch.torch.optim.AdamW(
            groups, lr=ADAM_OPTIONS["rate"], betas=betas, eps=ADAM_OPTIONS["epsilon"], **{option: True}
        )
        return self._job(side, layout, counts.ADAM_FLOAT32, optimizer.step, lambda: start[:COMPARED] - begin)


def _decayed(layout: Layout) -> int:
    """Number of elements with weight decay, a prefix of the flat array."""
    return segments(layout, parameter_groups(OptimizerConfig()))[0].decayed


def full_problems() -> list[Any]:
    """The problems on a GPU: attention with 16,384 tokens and 2048 channels, as in the FlashAttention papers."""
    attention = [Attention(16384 // t, t, 2048 // d, d) for d in (64, 128) for t in LENGTHS]
    models = (("gpt2", "124M"), ("gpt2-xl", "1.5B"))
    adam = [AdamW(label, Architecture(vocabulary=GPT2_VOCABULARY, **_model(name))) for name, label in models]
    return [CopyCeiling(2 << 30), GemmCeiling(8192), *attention, *adam]


def _model(name: str) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(SIZES[name])
    return sizes | {"kv_heads": sizes["heads"], "mlp_width": 4 * sizes["width"]}


def rehearsal_problems() -> list[Any]:
    """The same at sizes that a CPU computes in seconds."""
    tiny = Architecture(vocabulary=60, context=16, layers=1, heads=2, kv_heads=2, width=32, mlp_width=64)
    return [CopyCeiling(1 << 12), GemmCeiling(32), Attention(1, 70, 2, 64), AdamW("tiny", tiny)]
