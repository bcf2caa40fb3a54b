"""Benchmark of a GPT's output head in bf16 with loss and gradients, with logits in chunks of several sizes.

`cllm_gpu.devices.logit_chunks` computes the overhead of a chunk; this measures it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.kernels import counts
from bench.kernels.jobs import Job
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide
from cllm_gpu.devices.logit_chunks import ON_CARD
from cllm_gpu.ops.cuda.cross_entropy import cross_entropy
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.linear import linear_backward, linear_forward

BF16 = 2


@dataclass(frozen=True)
class Head:
    """Logits, losses and gradients of N rows of C with vocabulary V. chunks: rows per chunk, training's first."""

    rows: int
    width: int
    vocabulary: int
    chunks: tuple[int, ...]
    name: str = "head in chunks"

    @property
    def needs_bytes(self) -> int:
        logits = max(self.chunks) * self.vocabulary
        return BF16 * (logits + 2 * self.rows * self.width + self.vocabulary * self.width * 3)

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        normed = device.random((self.rows, self.width), "bfloat16", 1)
        head = device.random((self.vocabulary, self.width), "bfloat16", 2)
        head *= self.width**-0.5  # logits near 1
        targets = device.xp.asarray(np.arange(self.rows, dtype=np.int32) % self.vocabulary)
        logits = device.empty((max(self.chunks), self.vocabulary), "bfloat16")
        dnormed, dhead = device.empty(normed.shape, "bfloat16"), device.empty(head.shape, "float32")
        losses = device.empty((self.rows,), "float32")
        flops = 3 * counts.matmul_flops(self.rows, self.vocabulary, self.width)
        for chunk in self.chunks:
            call = functools.partial(
                _in_chunks, device.launcher, chunk, normed, head, targets, logits, losses, dnormed, dhead
            )
            size = {"N": self.rows, "C": self.width, "V": self.vocabulary, "chunk": chunk}
            side = "ours" if chunk == self.chunks[0] else f"ours, {chunk} rows"
            yield Job("logits, loss and gradients", side, size, call, flops, "TFLOP/s", lambda: dnormed)


def _in_chunks(
    launcher: Launcher,
    chunk: int,
    normed: Any,
    head: Any,
    targets: Any,
    logits: Any,
    losses: Any,
    dnormed: Any,
    dhead: Any,
) -> None:
    """Like the model's head: logits, losses and both gradients, chunk by chunk."""
    for start in range(0, len(targets), chunk):
        rows = slice(start, min(start + chunk, len(targets)))
        part = logits[: rows.stop - start]
        linear_forward(launcher, normed[rows], head, None, part)
        scale = 1.0 / len(targets)
        cross_entropy(launcher, part, targets[rows], losses[rows], ignore_index=-1, gradient_scale=scale)
        linear_backward(launcher, part, normed[rows], head, dnormed[rows], dhead, None, accumulate=start > 0)


def full_problems() -> list[Any]:
    """GPT-2 124M at 64·1024 tokens, the vocabulary padded to 50,304; 667 rows are 64 MB."""
    assert ON_CARD.rows is not None
    return [Head(65536, 768, 50304, (ON_CARD.rows, 667, 2048, 4096, 16384))]


def rehearsal_problems() -> list[Any]:
    """The same at a size that a CPU computes in seconds."""
    return [Head(9, 24, 40, (4, 9))]
