"""Evaluation against sums by hand and against the model's own logits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.inference.evaluate import evaluate, model_losses, perplexity
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.gradcheck import random_point
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.utils.errors import UserError


def identity(x):
    return x


def fixed(values):
    """A loss function that returns the given (losses, hits) in turn."""
    turns = iter(values)
    return lambda tokens, targets: next(turns)


def test_means_are_over_counted_targets_of_all_batches():
    batches = [(np.zeros((1, 3)), np.array([[4, -1, 2]])), (np.zeros((1, 2)), np.array([[0, 7]]))]
    losses = fixed([
        (np.array([1.0, 99.0, 2.0]), np.array([True, True, False])),
        (np.array([3.0, 4.0]), np.array([True, False])),
    ])  # fmt: skip
    result = evaluate(losses, batches, 2.0, identity)
    assert result.tokens == 4
    assert result.loss == (1 + 2 + 3 + 4) / 4
    assert result.accuracy == 2 / 4
    assert result.perplexity == math.exp(2.5)
    assert result.bits_per_byte == pytest.approx(2.5 / math.log(2) / 2, rel=1e-15)
    assert set(result.as_dict()) == {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens"}


def test_unknown_bytes_give_no_bits_per_byte():
    batches = [(np.zeros((1, 1)), np.array([[1]]))]
    assert evaluate(fixed([(np.ones(1), np.ones(1, bool))]), batches, None, identity).bits_per_byte is None


def test_sums_are_float64():
    """2²⁴ + 1 is not a float32: a float32 sum would lose every small loss."""
    values = np.concatenate([[np.float32(2**24)], np.ones(99, np.float32)]).astype(np.float32)
    batches = [(np.zeros((1, 100)), np.zeros((1, 100), np.int32))] * 2
    result = evaluate(fixed([(values, np.zeros(100, bool))] * 2), batches, None, identity)
    assert result.loss == (2**24 + 99) / 100


def test_arrays_come_from_the_device():
    batches = [(np.zeros((1, 2)), np.array([[1, 1]]))]
    device = fixed([(["loss", 1.0, 2.0], ["hit", True, True])])
    assert evaluate(device, batches, None, lambda x: np.array(x[1:])).loss == 1.5


def test_perplexity_overflows_to_infinity():
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.mark.parametrize("batches", [[], [(np.zeros((1, 2)), np.full((1, 2), -1))]])
def test_nothing_to_evaluate_is_an_error(batches):
    with pytest.raises(UserError, match="no token to evaluate"):
        evaluate(fixed([(np.zeros(2), np.zeros(2, bool))]), batches, None, identity)


@pytest.mark.parametrize("size", [0.0, -1.0, math.nan, math.inf])
def test_bytes_per_token_must_be_positive(size):
    with pytest.raises(UserError, match="bytes per token"):
        evaluate(fixed([]), [], size, identity)


def test_a_model_is_evaluated_by_its_own_logits():
    a = Architecture(vocabulary=19, context=9, layers=2, heads=2, kv_heads=2, width=8, mlp_width=16)
    backend = get_backend("numpy", workers=1)
    layout = Layout(parameter_specs(a), np.float64)
    model = Transformer(a, backend, layout.views(random_point(layout, seed=1)))
    generator = np.random.default_rng(3)
    batches = [tuple(generator.integers(0, 19, (2, b, 9))) for b in (3, 3, 1)]
    batches[1][1][0, 4] = -1
    result = evaluate(model_losses(model), batches, None, backend.to_host)

    losses, hits = [], []
    for tokens, targets in batches:
        activations = Activations(a, backend, len(tokens), 9, np.float64, training=False)
        x = model.logits(activations, tokens.astype(np.int32)).reshape(-1, 19)
        flat = targets.reshape(-1)
        row = np.log(np.exp(x).sum(axis=1)) - x[np.arange(flat.size), flat]
        losses += row[flat != -1].tolist()
        hits += (x.argmax(axis=1) == flat)[flat != -1].tolist()
    assert result.tokens == len(losses) == 62
    assert result.loss == pytest.approx(math.fsum(losses) / 62, rel=1e-13)  # 62 terms of size 3, each within 10·eps
    assert result.accuracy == sum(hits) / 62
