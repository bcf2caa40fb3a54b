"""One side of `bench.training.cpu_training`, in a separate process: trains a model and prints measurements as JSON.

Both sides start from the same weights and see the same batches, so their losses must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from typing import Any

import numpy as np

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.recompute import Recompute

RATE, WEIGHT_DECAY, CLIP, WARMUP = 1e-3, 0.01, 1.0, 3


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its batch size."""

    vocabulary: int
    length: int
    width: int
    layers: int
    heads: int
    batch: int

    def architecture(self) -> Architecture:
        """The model: learned positions, tied head, biases, no dropout."""
        return Architecture(
            vocabulary=self.vocabulary, context=self.length, layers=self.layers, heads=self.heads,
            kv_heads=self.heads, width=self.width, mlp_width=4 * self.width,
        )  # fmt: skip


SIZES = {"C384": Size(256, 256, 384, 6, 6, 8), "C128": Size(256, 64, 128, 4, 4, 12)}


class Ours:
    """This package's training step: gradients by worker threads, clipping, AdamW."""

    def __init__(self, size: Size, backend: str, threads: int, recompute: Recompute = "none") -> None:
        from cllm_gpu.backend import get_backend
        from cllm_gpu.config import OptimizerConfig
        from cllm_gpu.model.transformer import Transformer
        from cllm_gpu.optim.optimizer import Optimizer
        from cllm_gpu.training.data_parallel import GradientWorkers

        chosen = get_backend(backend, workers=threads)
        self.description = chosen.description
        layout = Layout(parameter_specs(size.architecture()), np.float32)
        self._parameters = layout.views(chosen.zeros(layout.size, np.float32))
        self._parameters.flat[...] = initial_values(layout, seed=1)
        self._gradients = layout.views(chosen.zeros(layout.size, np.float32))
        model = Transformer(size.architecture(), chosen, self._parameters)
        self._workers = GradientWorkers(model, size.batch, size.length, recompute=recompute)
        split = dataclasses.replace(chosen, ops=self._workers.ops)
        self._optimizer = Optimizer(OptimizerConfig(weight_decay=WEIGHT_DECAY, clip_norm=CLIP), split, layout)

    def step(self, tokens: Any, targets: Any) -> float:
        """One optimizer step; the mean loss in nats."""
        total = self._workers.loss_and_gradients(
            tokens, targets, self._gradients, gradient_scale=1.0 / tokens.size, accumulate=False
        )
        norm = self._optimizer.gradient_norm(self._gradients)
        self._optimizer.apply(self._parameters, self._gradients, rate=RATE, gradient_norm=norm)
        return total / tokens.size


class Torch:
    """The same model in PyTorch: eager, scaled_dot_product_attention, fused AdamW."""

    def __init__(self, size: Size, threads: int) -> None:
        import torch

        self._torch, self._size = torch, size
        torch.set_num_threads(threads)
        self.description = f"PyTorch {torch.__version__}"
        layout = Layout(parameter_specs(size.architecture()), np.float32)
        values = layout.views(initial_values(layout, seed=1))
        self._p = {name: torch.tensor(values[name], requires_grad=True) for name in values}
        groups = [
            {"params": [p for p in self._p.values() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self._p.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)

    def _loss(self, tokens: Any, targets: Any) -> Any:
        functional, p, s = self._torch.nn.functional, self._p, self._size

        def norm(x: Any, name: str) -> Any:
            return functional.layer_norm(x, (s.width,), p[f"{name}.weight"], p[f"{name}.bias"])

        def linear(x: Any, name: str) -> Any:
            return functional.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

        x = functional.embedding(tokens, p["token_embedding"]) + p["position_embedding"]
        for block in (f"blocks.{layer}" for layer in range(s.layers)):
            qkv = linear(norm(x, f"{block}.attention_norm"), f"{block}.qkv")
            q, k, v = (part.view(*part.shape[:2], s.heads, -1).transpose(1, 2) for part in qkv.split(s.width, 2))
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(attended.transpose(1, 2).reshape(x.shape), f"{block}.projection")
            hidden = linear(norm(x, f"{block}.mlp_norm"), f"{block}.mlp_up")
            x = x + linear(functional.gelu(hidden, approximate="tanh"), f"{block}.mlp_down")
        logits = functional.linear(norm(x, "final_norm"), p["token_embedding"])
        return functional.cross_entropy(logits.view(-1, s.vocabulary), targets.view(-1))

    def step(self, tokens: Any, targets: Any) -> float:
        """One optimizer step; the mean loss in nats."""
        torch = self._torch
        loss = self._loss(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._p.values(), CLIP)
        self._optimizer.step()
        return float(loss.item())


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Train `steps` steps after a few warmup steps and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["torch", "numpy", "native"])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("steps", type=int)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    size = SIZES[options.size]
    side: Any = Torch(size, options.threads) if options.side == "torch" else Ours(size, options.side, options.threads)
    generator = np.random.default_rng(7)
    seconds, first_step, loss = [], 0.0, 0.0
    for _ in range(WARMUP + options.steps):
        shape = (2, size.batch, size.length)
        tokens, targets = generator.integers(0, size.vocabulary, shape, dtype=np.int32)
        start = time.perf_counter()
        loss = side.step(tokens, targets)
        seconds.append(time.perf_counter() - start)
        first_step = first_step or time.time()
    result = {
        "description": side.description,
        "step_seconds": statistics.median(seconds[WARMUP:]),
        "first_step_at": first_step,
        "peak_bytes": peak_bytes(),
        "loss": loss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
