"""A batch split over threads: equal to the unsplit one, the same bits at every run, planned before it is allocated."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cllm_gpu.backend import get_backend
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.training.data_parallel import GradientWorkers, batch_parts, workers_plan
from cllm_gpu.utils.compiler import find_compiler

ARCHITECTURE = Architecture(
    vocabulary=31, context=9, layers=2, heads=2, kv_heads=1, width=12, mlp_width=20, dropout=0.2
)
DROPOUT = Dropout(ARCHITECTURE.dropout, seed=5, step=2, site=0)
SETTINGS = {"gradient_scale": 0.125, "dropout": DROPOUT}


@pytest.fixture(params=["numpy", "native"])
def name(request):
    if request.param == "native" and find_compiler() is None:
        pytest.skip("no C++ compiler: threads are not tested with the native backend")
    return request.param


def _model(name, workers, dtype=np.float64):
    backend = get_backend(name, workers=workers)
    layout = Layout(parameter_specs(ARCHITECTURE), dtype)
    return Transformer(ARCHITECTURE, backend, layout.views(initial_values(layout, seed=3)))


def _batch(generator, batch):
    tokens, targets = generator.integers(0, ARCHITECTURE.vocabulary, (2, batch, 9)).astype(np.int32)
    targets[0, :4] = -1
    return tokens, targets


def _gradients(model, tokens, targets, *, accumulate=False, start=7.0):
    layout = model.parameters.layout
    gradients = layout.views(np.full(layout.size, start, layout.dtype))
    with GradientWorkers(model, *tokens.shape) as workers:
        loss = workers.loss_and_gradients(tokens, targets, gradients, accumulate=accumulate, **SETTINGS)
    return loss, gradients


def test_batch_parts():
    assert batch_parts(5, 2) == [slice(0, 3), slice(3, 5)]
    assert batch_parts(2, 4) == [slice(0, 1), slice(1, 2)]
    assert batch_parts(6, 1) == [slice(0, 6)]


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("accumulate", [False, True])
def test_split_equals_unsplit(name, generator, within, workers, accumulate):
    """Dropout included: each part draws the mask of its place in the batch. Only the order of sums differs."""
    tokens, targets = _batch(generator, 5)
    want_loss, want = _gradients(_model(name, 1), tokens, targets, accumulate=accumulate)
    loss, gradients = _gradients(_model(name, workers), tokens, targets, accumulate=accumulate)
    within("loss", abs(loss - want_loss) / want_loss, 1e-14)
    for parameter in want:
        scale = np.abs(want[parameter]).max()
        within(parameter, float(np.abs(gradients[parameter] - want[parameter]).max() / scale), 1e-13)


def test_two_runs_have_the_same_bits(name, generator):
    tokens, targets = _batch(generator, 5)
    model = _model(name, 2, np.float32)
    (first_loss, first), (second_loss, second) = (_gradients(model, tokens, targets) for _ in range(2))
    assert first_loss == second_loss
    for parameter in first:
        assert np.array_equal(first[parameter], second[parameter])


def test_losses(name, generator):
    tokens, targets = _batch(generator, 5)
    results = []
    for workers in (1, 2):
        with GradientWorkers(_model(name, workers), 5, 9, training=False) as split:
            losses, hits = split.losses(tokens, targets)
            results.append((losses.copy(), hits))
    assert np.allclose(results[0][0], results[1][0], rtol=1e-13, atol=0)
    assert np.array_equal(results[0][1], results[1][1])
    assert np.all(results[1][0][:4] == 0)


@pytest.mark.parametrize("size", [5, 1024, 5000])
@pytest.mark.parametrize("decayed", [0, 3, 2048, 5000])
def test_flat_operations_over_slices(name, generator, size, decayed):
    """Elementwise: the bits do not change; the sums of squares do in their last digits."""
    p, g, m, v = np.abs(generator.standard_normal((4, size)))
    decayed = min(decayed, size)
    decay = {"rate": 0.1, "weight_decay": 0.3, "decayed": decayed, "gradient_scale": 0.5}
    adam = decay | {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "step": 2, "decoupled": True}
    results = []
    for workers in (1, 3):
        model = _model(name, workers)
        with GradientWorkers(model, 2, 3) as split:
            arrays = [x.copy() for x in (p, g, m, v)]
            sums = [split.ops.adam_step(*arrays, **adam), split.ops.sgd_step(arrays[0], g, None, momentum=0.0, **decay)]
            results.append((arrays, [*sums, split.ops.squared_norm(g)]))
    for one, three in zip(results[0][0], results[1][0], strict=True):
        assert np.array_equal(one, three)
    assert np.allclose(results[0][1], results[1][1], rtol=1e-13, atol=0)


@pytest.mark.parametrize("masters", [True, False])
def test_flat_operations_on_bfloat16_over_slices(generator, masters):
    """The copy, and the random bits of weights without masters, belong to elements, not to workers."""
    size = 5000
    p, g = generator.standard_normal((2, size)).astype(BFLOAT16)
    weights = p.astype(np.float32) if masters else p
    settings = {"rate": 0.1, "weight_decay": 0.3, "decayed": 2100, "gradient_scale": 0.5}
    settings["rounding"] = None if masters else StochasticRounding(3, 2, 7)
    adam = settings | {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "step": 2, "decoupled": True}
    results = []
    for workers in (1, 3):
        with GradientWorkers(_model("numpy", workers), 2, 3) as split:
            arrays = [weights.copy(), *np.zeros((2, size), np.float32), p.copy() if masters else None]
            held, m, v, copy = arrays
            split.ops.adam_step(held, g, m, v, copy, **adam)
            split.ops.sgd_step(held, g, m, copy, momentum=0.9, **settings)
            results.append([x for x in arrays if x is not None])
    for one, three in zip(*results, strict=True):
        assert np.array_equal(one, three)
    if masters:
        assert np.array_equal(results[0][3], results[0][0].astype(BFLOAT16))


def test_plan_is_what_is_allocated():
    model = _model("numpy", 2)
    plan = workers_plan(ARCHITECTURE, model.backend, model.parameters.layout, 5, 9)
    allocated = []

    class Counting:
        def __init__(self, backend):
            self.backend = backend

        def __getattr__(self, attribute):
            return getattr(self.backend, attribute)

        def empty_bytes(self, size):
            allocated.append(size)
            return self.backend.empty_bytes(size)

        def zeros(self, size, dtype):
            allocated.append(size * np.dtype(dtype).itemsize)
            return self.backend.zeros(size, dtype)

    model.backend = Counting(model.backend)
    GradientWorkers(model, 5, 9).close()
    assert sum(allocated) == plan.activations + plan.gradients
    assert plan.gradients == model.parameters.layout.bytes


def _blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_blas_is_single_threaded_while_open_and_threads_end():
    model = _model("numpy", 2)
    tokens, targets = _batch(np.random.default_rng(1), 4)
    with threadpool_limits(2, user_api="blas"):
        before, threads = _blas_threads(), threading.active_count()
        workers = GradientWorkers(model, 4, 9)
        workers.losses(tokens, targets)
        assert all(count == 1 for count in _blas_threads())
        assert threading.active_count() == threads + 1
        workers.close()
        assert threading.active_count() == threads
        assert _blas_threads() == before
        assert 2 in before


def test_an_error_in_a_thread_is_raised_after_all_have_ended(generator):
    model = _model("numpy", 2)
    tokens, targets = _batch(generator, 4)
    ended = []

    def embedding_forward(tokens, *arrays, **settings):
        ended.append(tokens[0, 0])
        raise FloatingPointError(f"part {tokens[0, 0]}")

    model.ops = model.ops.replace(embedding_forward=embedding_forward)
    tokens[0, 0], tokens[2, 0] = 0, 1
    with GradientWorkers(model, 4, 9) as workers, pytest.raises(FloatingPointError, match="part 0"):
        workers.losses(tokens, targets)
    assert sorted(ended) == [0, 1]


def test_another_shape_is_refused(generator):
    tokens, targets = _batch(generator, 3)
    with GradientWorkers(_model("numpy", 2), 4, 9) as workers, pytest.raises(ValueError, match=r"take \(4, 9\)"):
        workers.losses(tokens, targets)
