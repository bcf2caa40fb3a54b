"""The layers of a model in the order of its forward; parameters, memory plans and the transformer come from them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.attention import Attention
from cllm_gpu.model.layers.crystalline import Crystalline
from cllm_gpu.model.layers.embedding import Embedding
from cllm_gpu.model.layers.layer import Layer
from cllm_gpu.model.layers.layer_norm import LayerNorm
from cllm_gpu.model.layers.lm_head import LMHead
from cllm_gpu.model.layers.mlp import MLP
from cllm_gpu.model.layers.norm import Norm
from cllm_gpu.model.layers.rotary import Rotary


@dataclass(frozen=True)
class Block:
    """One block: norm → attention → add, norm → MLP → add."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP

    @property
    def all(self) -> tuple[Layer, ...]:
        """In the order of the forward."""
        return (self.attention_norm, self.attention, self.mlp_norm, self.mlp)


@dataclass(frozen=True)
class ModelLayers:
    """Every layer of a model."""

    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: LMHead
    rotary: Rotary | None
    crystalline: Crystalline | None

    @property
    def outside_blocks(self) -> tuple[Layer, ...]:
        """Those that the model has once, in the order of the forward."""
        layers = (self.embedding, self.final_norm, self.head, self.rotary, self.crystalline)
        return tuple(layer for layer in layers if layer is not None)

    @property
    def all(self) -> tuple[Layer, ...]:
        """Every layer: the embedding, the blocks', then the others."""
        embedding, *others = self.outside_blocks
        return (embedding, *(layer for block in self.blocks for layer in block.all), *others)


@functools.lru_cache(maxsize=64)
def model_layers(a: Architecture) -> ModelLayers:
    """The layers of an architecture. This is where a setting chooses between layers."""
    rotary = Rotary(a) if a.positions == "rope" else None
    crystalline = None if a.lattice is None else Crystalline(a, a.lattice)
    blocks = tuple(
        Block(
            attention_norm=LayerNorm(a, "attention_norm", block, site=2 * block),
            attention=Attention(a, block, rotary, crystalline),
            mlp_norm=LayerNorm(a, "mlp_norm", block, site=2 * block + 1),
            mlp=MLP(a, block),
        )
        for block in range(a.layers)
    )
    final_norm = LayerNorm(a, "final_norm", None, site=2 * a.layers)
    return ModelLayers(Embedding(a), blocks, final_norm, LMHead(a), rotary, crystalline)
