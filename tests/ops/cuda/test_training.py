"""A whole training run on the kernels follows the reference's losses; signatures of both sides agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import SIZES, Architecture, LatticeTerms
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.parameters import FlatParameters, Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.dropout import Dropout
from tests.ops.cuda.devices import BFLOAT16, simulator_or_skip

STEPS = 20
RELATIVE = 1e-5
"""Of the loss over 20 steps: float32 rounding of a loss near ln V, grown by the steps before."""


def _backend(name: str) -> Backend:
    if name == "simulator":
        simulator_or_skip()
    return get_backend(name, workers=1)


def _losses(architecture: Architecture, backend: Backend, steps: int, *, dropout: bool) -> list[float]:
    """Losses per token of `steps` AdamW steps on random tokens of a fixed seed, with clipping to norm 1."""
    ops, rng = backend.ops, np.random.default_rng(3)
    layout = Layout(parameter_specs(architecture), np.float32)
    flats = [backend.zeros(layout.size, np.float32) for _ in range(4)]
    flats[0][...] = backend.asarray(initial_values(layout, 1))
    parameters, gradients = layout.views(flats[0]), layout.views(flats[1])
    model = Transformer(architecture, backend, parameters)
    batch, length = 3, 17
    activations = Activations(architecture, backend, batch, length, np.float32, training=True)
    decayed = min(layout.offsets[name] for name, spec in layout.specs.items() if not spec.decayed)
    losses = []
    for step in range(1, steps + 1):
        draws = rng.zipf(1.5, (batch, length + 1)) % architecture.vocabulary
        tokens, targets = (backend.asarray(np.ascontiguousarray(x, np.int32)) for x in (draws[:, :-1], draws[:, 1:]))
        mask = Dropout(architecture.dropout, seed=5, step=step, site=0) if dropout else None
        total = model.loss_and_gradients(
            activations, tokens, targets, gradients, gradient_scale=1.0 / tokens.size, accumulate=False, dropout=mask
        )
        norm = float(np.sqrt(ops.squared_norm(flats[1])))
        ops.adam_step(
            *flats, rate=3e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, step=step, weight_decay=0.1,
            decayed=decayed, decoupled=True, gradient_scale=min(1.0, 1.0 / norm),
        )  # fmt: skip
        losses.append(total / tokens.size)
    return losses


def _tiny(**changes: Any) -> Architecture:
    return Architecture(vocabulary=300, **(SIZES["tiny"] | {"kv_heads": 2, "mlp_width": 256} | changes))


def _follow(got: list[float], want: list[float]) -> None:
    error = max(abs(a - b) / b for a, b in zip(got, want, strict=True))
    print(f"losses from {want[0]:.4f} to {want[-1]:.4f}: largest relative difference {error:.2e}")
    assert want[-1] < want[0] - 0.5, "the run learns nothing, so it proves nothing"
    assert error <= RELATIVE, f"losses differ by {error:.2e} from the reference's"


@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_training_follows_the_reference(name: str) -> None:
    """The tiny model with learned positions, 20 steps."""
    architecture = _tiny()
    want = _losses(architecture, _backend("numpy"), STEPS, dropout=False)
    _follow(_losses(architecture, _backend(name), STEPS, dropout=False), want)


def test_training_with_everything_else_switched_on() -> None:
    """Rotary positions, grouped queries, dropout, no biases, a head of its own: odd sizes, 20 steps."""
    architecture = _tiny(positions="rope", kv_heads=1, dropout=0.1, bias=False, tied_head=False, width=52, heads=2)
    want = _losses(architecture, _backend("numpy"), STEPS, dropout=True)
    _follow(_losses(architecture, _backend("simulator"), STEPS, dropout=True), want)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_crystalline_training_follows_the_reference(positions: str) -> None:
    """Every term, learned points, the symmetry on half of the head, starting where they matter."""
    everything = LatticeTerms(
        matches=8, distance=True, prime_distance=True, symmetry_fraction=0.5, learned_points=True, start=0.5
    )
    architecture = _tiny(positions=positions, kv_heads=1, lattice=everything)
    want = _losses(architecture, _backend("numpy"), STEPS, dropout=False)
    _follow(_losses(architecture, _backend("simulator"), STEPS, dropout=False), want)


LATTICE = LatticeTerms(matches=8, distance=True, symmetry_fraction=0.5, start=0.5)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("lattice", [None, LATTICE], ids=["standard", "crystalline"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(
    lattice: LatticeTerms | None, positions: str
) -> None:
    architecture = _tiny(positions=positions, lattice=lattice)
    backend = _backend("simulator")
    layout = Layout(parameter_specs(architecture), np.float32)
    model = Transformer(architecture, backend, layout.views(initial_values(layout, 1)))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    whole = model.logits(Activations(architecture, backend, 2, 9, np.float32, training=False), tokens)
    cache = KeyValueCache(architecture, backend, 2, 16, np.float32)
    first = Activations(architecture, backend, 2, 6, np.float32, training=False)
    one = Activations(architecture, backend, 2, 1, np.float32, training=False)
    got = [model.next_logits(first, np.ascontiguousarray(tokens[:, :6]), cache)]
    got += [model.next_logits(one, np.ascontiguousarray(tokens[:, i : i + 1]), cache) for i in range(6, 9)]
    for position, logits in zip(range(5, 9), got, strict=True):
        assert np.abs(logits - whole[:, position]).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize(
    "changes",
    [{}, {"positions": "rope", "kv_heads": 1, "dropout": 0.1}, {"lattice": LatticeTerms(matches=8, start=0.5)}],
    ids=["learned", "rope", "crystalline"],
)
def test_loss_and_gradients_in_bfloat16(changes: dict[str, Any]) -> None:
    """A whole forward and backward in bf16 storage, beside float32 from the same (bf16) parameters.

    Every array is rounded to 8 bits, 2^-9 of its values on average, and some thirty roundings follow each other: the
    gradient may be off by about √30·2^-9 = 1% of its length; twice that is let through.
    """
    architecture = _tiny(**changes)
    rng = np.random.default_rng(3)
    tokens, targets = (rng.integers(0, 300, (3, 33)).astype(np.int32) for _ in range(2))
    mask = Dropout(architecture.dropout, seed=5, step=1, site=0) if architecture.dropout else None
    results = {}
    for name, dtype in (("numpy", np.dtype(np.float32)), ("simulator", BFLOAT16)):
        backend = _backend(name)
        layout = Layout(parameter_specs(architecture), dtype)
        start = initial_values(Layout(parameter_specs(architecture), np.float32), 1)
        flat = _copy_parameters(architecture, start.astype(BFLOAT16), layout)
        gradients = layout.views(backend.zeros(layout.size, dtype))
        activations = Activations(architecture, backend, 3, 33, dtype, training=True)
        total = Transformer(architecture, backend, flat).loss_and_gradients(
            activations, tokens, targets, gradients, gradient_scale=1.0 / 99, accumulate=False, dropout=mask
        )
        vector = np.concatenate([gradients[key].astype(np.float64).reshape(-1) for key in sorted(gradients)])
        results[name] = total / 99, vector
    (loss, gradient), (want_loss, want) = results["simulator"], results["numpy"]
    error = float(np.linalg.norm(gradient - want) / np.linalg.norm(want))
    print(f"loss {loss:.5f}, float32 {want_loss:.5f}; gradient off by {error:.2%}")
    assert abs(loss - want_loss) <= 2.0**-9 * want_loss
    assert error <= 0.02


def _copy_parameters(architecture: Architecture, start: Any, layout: Layout) -> FlatParameters:
    """The bf16 values `start`, which lie as in the float32 layout, in `layout`."""
    source = Layout(parameter_specs(architecture), np.float32).views(start)
    parameters = layout.views(np.zeros(layout.size, layout.dtype))
    for key, view in parameters.items():
        view[...] = source[key].astype(layout.dtype)
    return parameters
