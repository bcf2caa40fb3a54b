"""GPT-2 in PyTorch as a user would write it today, with which this package's training is compared.

Written for torch.compile, with scaled_dot_product_attention, bf16 autocast over float32 weights, and fused AdamW.
Parameters have this package's names, so that both sides start from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from cllm_gpu.model.architecture import Architecture

EMBEDDINGS = ("token_embedding", "position_embedding")


class Block(nn.Module):
    """Attention and MLP, each with a layer norm before it, each added to the residual stream."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.heads = a.heads
        self.attention_norm = nn.LayerNorm(a.width)
        self.qkv = nn.Linear(a.width, a.qkv_width)
        self.projection = nn.Linear(a.width, a.width)
        self.mlp_norm = nn.LayerNorm(a.width)
        self.mlp_up = nn.Linear(a.width, a.mlp_width)
        self.mlp_down = nn.Linear(a.mlp_width, a.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C)."""
        B, T, C = x.shape
        parts = self.qkv(self.attention_norm(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).contiguous().view(B, T, C))
        hidden = functional.gelu(self.mlp_up(self.mlp_norm(x)), approximate="tanh")
        return x + self.mlp_down(hidden)


class NanoGPT(nn.Module):
    """Token and learned position embeddings, blocks, a final norm, and an output projection tied to the embedding."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(a.vocabulary, a.width)
        self.position_embedding = nn.Embedding(a.context, a.width)
        self.blocks = nn.ModuleList(Block(a) for _ in range(a.layers))
        self.final_norm = nn.LayerNorm(a.width)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats. tokens, targets: (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.final_norm(x), self.token_embedding.weight)
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def load_weights(model: NanoGPT, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Copy all of this package's float32 parameters by name."""
    named = {f"{name}.weight" if name in EMBEDDINGS else name: values[name] for name in values}
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in named.items()}, strict=True)


def fused_adamw(model: nn.Module, *, rate: float, weight_decay: float, betas: tuple[float, float]) -> Any:
    """Fused AdamW; only matrices have weight decay."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
