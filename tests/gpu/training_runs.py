"""A short training run on any backend: the model, AdamW with clipping, tokens of a fixed seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.architecture import SIZES, Architecture
from cllm_gpu.backend import Backend
from cllm_gpu.model import Transformer
from cllm_gpu.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.workspace import Workspace

BATCH, LENGTH = 4, 24


def tiny_architecture(**changes: Any) -> Architecture:
    """The named size "tiny" over 97 tokens."""
    return Architecture(vocabulary=97, **(SIZES["tiny"] | {"kv_heads": 2, "mlp_width": 256, "context": 32} | changes))


@dataclass
class Run:
    """A model in training."""

    backend: Backend
    architecture: Architecture

    def __post_init__(self) -> None:
        self.layout = Layout(parameter_specs(self.architecture), np.float32)
        self.flats = [self.backend.zeros(self.layout.size, np.float32) for _ in range(4)]
        self.flats[0][...] = self.backend.asarray(initial_values(self.layout, 1))
        self.model = Transformer(self.architecture, self.backend, self.layout.views(self.flats[0]))
        self.gradients = self.layout.views(self.flats[1])
        self.workspace = Workspace(self.architecture, self.backend, BATCH, LENGTH, np.float32, training=True)
        self.generator = np.random.default_rng(3)
        self.done = 0

    def step(self) -> float:
        """One AdamW step; the mean loss before it, in nats."""
        draws = self.generator.zipf(1.5, (BATCH, LENGTH + 1)) % self.architecture.vocabulary
        parts = (np.ascontiguousarray(x, np.int32) for x in (draws[:, :-1], draws[:, 1:]))
        tokens, targets = (self.backend.asarray(x) for x in parts)
        total = self.model.loss_and_gradients(
            self.workspace, tokens, targets, self.gradients, gradient_scale=1.0 / tokens.size, accumulate=False
        )
        norm = float(np.sqrt(self.backend.ops.squared_norm(self.flats[1])))
        self.done += 1
        self.backend.ops.adam_step(
            *self.flats, rate=3e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, step=self.done, weight_decay=0.1,
            decayed=self.layout.decayed, decoupled=True, gradient_scale=min(1.0, 1.0 / norm),
        )  # fmt: skip
        return total / tokens.size
