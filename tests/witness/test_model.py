"""Logits, loss and every gradient against the same model written in PyTorch and differentiated by autograd."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.model.layers.layer_norm import EPSILON
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.reference.dropout import Dropout, dropout_forward

pytestmark = pytest.mark.witness

BASE = Architecture(vocabulary=61, context=13, layers=3, heads=4, kv_heads=4, width=24, mlp_width=52)
VARIANTS = {
    "tied-learned": {},
    "untied-learned": {"tied_head": False},
    "tied-rope": {"positions": "rope"},
    "untied-rope-no-bias": {"tied_head": False, "positions": "rope", "bias": False},
    "no-bias": {"bias": False},
    "grouped-rope": {"positions": "rope", "kv_heads": 2},
    "one-kv-head": {"kv_heads": 1},
    "dropout": {"dropout": 0.25},
    "crystalline": {"lattice": LatticeTerms()},
    "crystalline-all-rope-grouped": {
        "lattice": LatticeTerms(
            matches=5, distance=True, prime_distance=True, symmetry_fraction=0.8, learned_points=True
        ),
        "positions": "rope",
        "kv_heads": 2,
        "width": 40,
    },
    "dropout-rope-grouped-untied": {"dropout": 0.1, "positions": "rope", "kv_heads": 2, "tied_head": False},
}
SHAPES = {"B3T11": (3, 11), "B2T1": (2, 1)}


class Autograd:
    """The model in PyTorch's own terms, over leaf tensors made from our parameters."""

    def __init__(self, torch, a, parameters, dropout):
        self.torch, self.a, self.dropout = torch, a, dropout
        self.p = {name: torch.tensor(np.array(view), requires_grad=True) for name, view in parameters.items()}

    def linear(self, x, name):
        return self.torch.nn.functional.linear(x, self.p[f"{name}.weight"], self.p.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        return self.torch.nn.functional.layer_norm(x, (self.a.width,), weight, bias, EPSILON)

    def dropped(self, x, site):
        """PyTorch draws other masks, so ours is multiplied in as a constant."""
        if self.dropout is None:
            return x
        mask = np.empty(x.shape, self.torch.empty(0, dtype=x.dtype).numpy().dtype)
        dropout_forward(np, np.ones_like(mask), mask, dropout=dataclasses.replace(self.dropout, site=site))
        return x * self.torch.from_numpy(mask)

    def rotated(self, x):
        """x (B, T, H, D): pairs (m, m + D/2) as complex numbers times exp(i·position·10000^(−2m/D))."""
        torch, half = self.torch, x.shape[-1] // 2
        positions = torch.arange(x.shape[1], dtype=torch.float64)
        frequencies = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
        angles = torch.outer(positions, frequencies)
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex(x[:0, :0], x[:0, :0]).dtype)[:, None]
        z = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    def crystallised(self, x, tokens):
        """x (B, T, H, D): the first pairs as complex numbers, conjugated to reflect, times exp(i·angle·(m + 1))."""
        torch, pairs = self.torch, self.a.symmetry_pairs
        z = torch.complex(x[..., 0 : 2 * pairs : 2].contiguous(), x[..., 1 : 2 * pairs : 2].contiguous())
        z = torch.where((tokens % 24 >= 12)[..., None, None], z.conj(), z)
        angles = math.pi / 6 * (tokens % 12).double()[..., None, None] * torch.arange(1, pairs + 1)
        z = z * torch.polar(torch.ones_like(angles), angles).to(z.dtype)
        turned = torch.stack([z.real, z.imag], dim=-1).flatten(-2)
        return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)

    def lattice_scores(self, tokens, name):
        """The terms (B, H, T, T) from dense T×T arrays, matches by comparing shifted copies of the sequence."""
        torch, lattice, length = self.torch, self.a.lattice, tokens.shape[1]
        features = []
        if lattice.uses_points:
            constant = torch.tensor(lattice_points(self.a.vocabulary)).to(self.p["token_embedding"].dtype)
            points = self.p.get("lattice_points", constant)[tokens]
            difference = points[:, :, None] - points[:, None]
            square = (difference**2).sum(dim=-1)
            equal = square == 0  # autograd's derivative of √0 is infinite
            features += [-torch.where(equal, 0, torch.sqrt(torch.where(equal, 1, square)))] * lattice.distance
            features += [-difference[..., 2].abs()] * lattice.prime_distance
        features += [tokens[:, :, None] == tokens[:, None]] * lattice.same_token
        for n in range(1, lattice.matches + 1):
            match = torch.ones(tokens.shape[0], length, length, dtype=torch.bool)
            for m in range(n):
                earlier = torch.full_like(tokens, -1)
                earlier[:, m:] = tokens[:, : length - m]  # t_{i−m}
                before = torch.full_like(tokens, -2)
                before[:, m + 1 :] = tokens[:, : max(length - m - 1, 0)]  # t_{j−1−m}
                match &= earlier[:, :, None] == before[:, None]
            features.append(match)
        scalars = self.p[f"{name}.lattice_scalars"]
        return sum(scalars[:, i, None, None] * f[:, None] for i, f in enumerate(features))

    def attention(self, x, name, tokens):
        a, (batch, length, _) = self.a, x.shape
        qkv = self.linear(x, f"{name}.qkv").reshape(batch, length, -1, a.head_size)
        q, k, v = qkv.split([a.heads, a.kv_heads, a.kv_heads], dim=2)
        if a.symmetry_pairs:
            q, k = self.crystallised(q, tokens), self.crystallised(k, tokens)
        if a.positions == "rope":
            q, k = self.rotated(q), self.rotated(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(a.heads // a.kv_heads, dim=1) for y in (k, v))
        if a.lattice is None:
            out = self.torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = self.torch.ones(length, length, dtype=bool).triu(1)
            scores = self.lattice_scores(tokens, name).masked_fill(future, -math.inf)
            out = self.torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.linear(out.transpose(1, 2).reshape(batch, length, a.width), f"{name}.projection")

    def logits(self, tokens):
        x = self.p["token_embedding"][tokens]
        if self.a.positions == "learned":
            x = x + self.p["position_embedding"][: tokens.shape[1]]
        x = self.dropped(x, 0)
        for layer in range(self.a.layers):
            name = f"blocks.{layer}"
            x = x + self.dropped(self.attention(self.norm(x, f"{name}.attention_norm"), name, tokens), 2 * layer + 1)
            hidden = self.linear(self.norm(x, f"{name}.mlp_norm"), f"{name}.mlp_up")
            hidden = self.torch.nn.functional.gelu(hidden, approximate="tanh")
            x = x + self.dropped(self.linear(hidden, f"{name}.mlp_down"), 2 * layer + 2)
        head = self.p["token_embedding" if self.a.tied_head else "head"]
        return self.norm(x, "final_norm") @ head.T

    def loss(self, logits, targets):
        return self.torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-9), (np.float32, 1e-5)], ids=["float64", "float32"])
def test_logits_loss_and_gradients(name, shape, dtype, bound, build_model, torch, within):
    """Relative errors of norms; of each parameter's gradient relative to the norm of the whole gradient (the gradient
    of a key's bias is zero in exact arithmetic, so it has no scale of its own)."""
    a = dataclasses.replace(BASE, **VARIANTS[name])
    model, gradients = build_model(a, dtype)
    tokens, targets = np.random.default_rng(3).integers(a.vocabulary, size=(2, *SHAPES[shape]), dtype=np.int32)
    targets[0, 0] = IGNORE_INDEX
    dropout = Dropout(a.dropout, seed=2, step=9, site=0) if a.dropout else None
    witness = Autograd(torch, a, model.parameters, None)
    expected = witness.logits(torch.from_numpy(tokens).long()).detach().numpy()
    logits = model.logits(Activations(a, model.backend, *tokens.shape, dtype, training=False), tokens)
    within("logits", float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)), bound)

    witness = Autograd(torch, a, model.parameters, dropout)
    loss = witness.loss(witness.logits(torch.from_numpy(tokens).long()), torch.from_numpy(targets).long())
    (loss * 0.5).backward()
    w = Activations(a, model.backend, *tokens.shape, dtype, training=True)
    ours = model.loss_and_gradients(
        w, tokens, targets, gradients, gradient_scale=0.5, accumulate=False, dropout=dropout
    )  # fmt: skip
    within("loss", abs(ours - loss.item()) / loss.item(), bound)
    theirs = {group: parameter.grad.numpy() for group, parameter in witness.p.items()}
    assert set(theirs) == set(gradients)
    norm = math.sqrt(sum(float(np.sum(g.astype(np.float64) ** 2)) for g in theirs.values()))
    for group, gradient in gradients.items():
        within(group, float(np.linalg.norm(gradient - theirs[group])) / norm, bound)
