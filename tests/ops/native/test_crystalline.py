"""A crystalline model with native operations against the same with the reference's, and with its own cache."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.gradcheck import random_point
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.training.data_parallel import GradientWorkers
from tests.ops.native.conftest import relative_error

EVERYTHING = LatticeTerms(
    matches=8, same_token=True, distance=True, prime_distance=True, symmetry_fraction=0.6, learned_points=True
)
LATTICES = {
    "matches": LatticeTerms(matches=3, same_token=False),
    "same token": LatticeTerms(matches=0, same_token=True),
    "symmetry": LatticeTerms(matches=1, symmetry_fraction=1.0),
    "fixed points": LatticeTerms(matches=2, distance=True),
    "everything": EVERYTHING,
}
SHAPE = {"vocabulary": 5, "context": 30, "layers": 2, "heads": 4, "kv_heads": 2, "width": 40, "mlp_width": 24}
EPS = float(np.finfo(np.float64).eps)


@pytest.fixture(autouse=True)
def _products(library, monkeypatch):
    """The native backend multiplies as the library under test does."""
    monkeypatch.setenv("CLLM_MKL", "0" if library.products.startswith("own") else "1")


def _model(backend, lattice, positions="learned"):
    architecture = Architecture(lattice=lattice, positions=positions, **SHAPE)
    layout = Layout(parameter_specs(architecture), np.float64)
    parameters = layout.views(backend.zeros(layout.size, np.float64))
    parameters.flat[...] = random_point(layout, seed=3)
    return Transformer(architecture, backend, parameters)


def _loss_and_gradients(backend, lattice, tokens, targets, positions):
    model = _model(backend, lattice, positions)
    layout = model.parameters.layout
    gradients = layout.views(backend.zeros(layout.size, np.float64))
    workers = GradientWorkers(model, *tokens.shape)
    for accumulate in (False, True):
        loss = workers.loss_and_gradients(tokens, targets, gradients, gradient_scale=0.1, accumulate=accumulate)
    workers.close()
    return loss, gradients


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("lattice", LATTICES.values(), ids=list(LATTICES))
def test_loss_and_gradients(generator, within, lattice, positions):
    """Two batches one after the other, the second added; two workers. Rounding grows through two blocks of sums."""
    tokens, targets = generator.integers(0, SHAPE["vocabulary"], (2, 3, 30)).astype(np.int32)
    expected, measured = (
        _loss_and_gradients(get_backend(name, workers=2), lattice, tokens, targets, positions)
        for name in ("numpy", "native")
    )
    within("loss", abs(measured[0] - expected[0]) / expected[0], 100 * EPS)
    for name, want in expected[1].items():
        within(name, relative_error(measured[1][name], want), 2**14 * EPS)


@pytest.mark.parametrize("lattice", LATTICES.values(), ids=list(LATTICES))
def test_cache(generator, within, lattice):
    """Token by token, and in pieces, the cache gives what the whole sequence gives."""
    model = _model(get_backend("native", workers=1), lattice)
    a, tokens = model.architecture, generator.integers(0, SHAPE["vocabulary"], (2, 17)).astype(np.int32)
    for pieces in ([1] * 17, [5, 11, 1]):
        cache = KeyValueCache(a, model.backend, 2, 30, np.float64)
        done = 0
        for piece in pieces:
            part = np.ascontiguousarray(tokens[:, done : done + piece])
            activations = Activations(a, model.backend, 2, piece, np.float64, training=False)
            logits = model.next_logits(activations, part, cache)
            done += piece
            seen = np.ascontiguousarray(tokens[:, :done])
            whole = Activations(a, model.backend, 2, done, np.float64, training=False)
            within(f"{done} tokens", relative_error(logits, model.logits(whole, seen)[:, -1]), 2**12 * EPS)
