"""Benchmark of crystalline attention, forward and backward together, compared with standard attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.kernels import counts
from bench.kernels.jobs import Job
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide
from cllm_gpu.model.lattice import lattice_points, symmetry_turns
from cllm_gpu.ops.cuda.attention import attention_backward, attention_forward
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry

KERNEL = "crystalline attention"
STANDARD, SYMMETRY = "ours, standard", "ours, symmetry on a quarter"
MATCHES, DISTANCES = "ours, matches to 8", "ours, all terms"
CHOICES = {MATCHES: (False, False, False, 8), DISTANCES: (True, True, True, 8)}
"""Side → distance, prime distance, same token, matches."""
LENGTHS = (1024, 4096)
VOCABULARY = 50257


def words(batch: int, length: int) -> np.ndarray[Any, Any]:
    """Tokens (B, T) with the frequencies of words: Zipf's law over a vocabulary of 50,257."""
    draws = np.random.default_rng(1).zipf(1.1, (batch, length))
    return ((draws - 1) % VOCABULARY).astype(np.int32)


def characters(batch: int, length: int) -> np.ndarray[Any, Any]:
    """Tokens (B, T) that are bytes of program text: the sources in this folder, repeated."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return np.resize(np.frombuffer(text, np.uint8), (batch, length)).astype(np.int32)


TEXTS = {"words": words, "bytes": characters}


@dataclass(frozen=True)
class Crystalline:
    """Causal bf16 attention, forward and backward in one call, operands (B, T, H, D)."""

    batch: int
    length: int
    heads: int
    head_size: int

    @property
    def name(self) -> str:
        return f"{KERNEL} D={self.head_size} T={self.length}"

    @property
    def needs_bytes(self) -> int:
        return 12 * 2 * self.batch * self.length * self.heads * self.head_size

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        shape = self.batch, self.length, self.heads, self.head_size
        operands = [device.random(shape, "bfloat16", seed) for seed in range(4)]
        results = [device.empty(shape, "bfloat16") for _ in range(4)]
        lse = device.empty((self.batch, self.heads, self.length), "float32")
        for text, tokens_of in TEXTS.items():
            tokens = tokens_of(self.batch, self.length)
            yield self._job(text, STANDARD, functools.partial(self._call, device, operands, results, lse, None))
            for side, choice in CHOICES.items():
                score_bias = self._score_bias(device, tokens, choice)
                yield self._job(text, side, functools.partial(self._call, device, operands, results, lse, score_bias))
            turns = device.xp.asarray(symmetry_turns(self.head_size // 8).astype(np.float32))
            symmetry = Symmetry(device.xp.asarray(tokens), turns)
            call = functools.partial(self._call, device, operands, results, lse, None, symmetry)
            yield self._job(text, SYMMETRY, call)

    def _job(self, text: str, side: str, call: Any) -> Job:
        arguments = self.batch, self.heads, self.length, self.head_size
        flops = counts.attention_forward_flops(*arguments, causal=True)
        flops += counts.attention_backward_flops(*arguments, causal=True)
        size = {"B": self.batch, "T": self.length, "H": self.heads, "D": self.head_size, "tokens": text}
        return Job(KERNEL, side, size, call, flops, "TFLOP/s")

    def _score_bias(self, device: Device, tokens: Any, choice: tuple[bool, bool, bool, int]) -> ScoreBias:
        points = device.xp.asarray(lattice_points(VOCABULARY).astype(np.float32)[tokens])
        scalars = device.random((self.heads, sum(choice)), "bfloat16", 5)
        return ScoreBias(device.xp.asarray(tokens), points, scalars, *choice)

    def _call(
        self,
        device: Device,
        operands: Any,
        results: Any,
        lse: Any,
        score_bias: ScoreBias | None,
        symmetry: Symmetry | None = None,
    ) -> None:
        q, k, v, dout = operands
        out, *gradients = results
        options: dict[str, Any] = {
            "causal": True,
            "scale": self.head_size**-0.5,
            "score_bias": score_bias,
            "symmetry": symmetry,
        }
        attention_forward(device.launcher, q, k, v, out, lse, **options)
        dscore_bias = None
        if score_bias is not None:
            dscore_bias = ScoreBiasGradients(
                device.launcher.scratch("bench_dterms", score_bias.scalars.shape, "bfloat16"), None
            )
        attention_backward(device.launcher, dout, q, k, v, out, lse, *gradients, dscore_bias=dscore_bias, **options)


def full_problems() -> list[Any]:
    """16,384 tokens and 2048 channels, like the other attention problems."""
    return [Crystalline(16384 // t, t, 2048 // d, d) for d in (64, 128) for t in LENGTHS]


def rehearsal_problems() -> list[Any]:
    """The same at a size that a CPU computes in seconds."""
    return [Crystalline(1, 70, 2, 64)]
