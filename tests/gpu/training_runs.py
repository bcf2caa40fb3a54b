"""A short training run on any backend: the model, AdamW with clipping, tokens of a fixed seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import SIZES, Architecture
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.optim.optimizer import Optimizer

BATCH, LENGTH = 4, 24


def tiny_architecture(**changes: Any) -> Architecture:
    """The named size "tiny" over 97 tokens."""
    return Architecture(vocabulary=97, **(SIZES["tiny"] | {"kv_heads": 2, "mlp_width": 256, "context": 32} | changes))


@dataclass
class Run:
    """A model in training."""

    backend: Backend
    architecture: Architecture
    masters: bool = True
    """Float32 master weights, where the backend's precision is bf16."""
    wide_gradients: bool = False
    """Float32 ones, as where micro-batches add to them."""

    def __post_init__(self) -> None:
        backend, layout = self.backend, Layout(parameter_specs(self.architecture), self.backend.dtype)
        summed = layout.widened() if self.wide_gradients else layout
        self.parameters, self.gradients = (x.views(backend.zeros(x.size, x.dtype)) for x in (layout, summed))
        config = OptimizerConfig(beta2=0.99, weight_decay=0.1, clip_norm=1.0, master_weights=self.masters)
        self.optimizer = Optimizer(config, backend, layout)
        weights = self.optimizer.weights(self.parameters)
        weights.flat[...] = backend.asarray(initial_values(weights.layout, 1))
        self.optimizer.round_masters(self.parameters)
        self.model = Transformer(self.architecture, backend, self.parameters)
        self.activations = Activations(
            self.architecture, backend, BATCH, LENGTH, layout.dtype, training=True, gradient_dtype=summed.dtype
        )
        self.generator = np.random.default_rng(3)

    @property
    def flats(self) -> list[Any]:
        """Everything a step changes, as flat arrays."""
        kept = [self.parameters, self.gradients, self.optimizer.weights(self.parameters)]
        return [views.flat for views in (*kept, *self.optimizer.state.values())]

    def step(self) -> float:
        """One AdamW step; the mean loss before it, in nats."""
        draws = self.generator.zipf(1.5, (BATCH, LENGTH + 1)) % self.architecture.vocabulary
        parts = (np.ascontiguousarray(x, np.int32) for x in (draws[:, :-1], draws[:, 1:]))
        tokens, targets = (self.backend.asarray(x) for x in parts)
        total = self.model.loss_and_gradients(
            self.activations, tokens, targets, self.gradients, gradient_scale=1.0 / tokens.size, accumulate=False
        )
        norm = self.optimizer.gradient_norm(self.gradients)
        self.optimizer.apply(self.parameters, self.gradients, rate=3e-3, gradient_norm=norm)
        return total / tokens.size
