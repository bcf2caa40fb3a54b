"""Recompute levels: the same gradients to the bit, in less memory, whatever the model, the backend and the storage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import Config, ModelConfig, TrainingConfig
from cllm_gpu.model.activations import Activations, plan_activations
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.gradcheck import random_point
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.recompute import LEVELS, Recompute
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import BFLOAT16, Precision
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.registry import cuda_operations
from cllm_gpu.training.data_parallel import GradientWorkers
from cllm_gpu.training.memory_plan import plan_memory
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.profiling import Ranges
from tests.ops.cuda.devices import simulator_or_skip
from tests.ops.cuda.lt_stand_in import StandIn, launcher_with

BASE = Architecture(vocabulary=23, context=12, layers=3, heads=4, kv_heads=4, width=32, mlp_width=56)
EVERY_TERM = LatticeTerms(matches=3, distance=True, prime_distance=True, symmetry_fraction=0.5, learned_points=True)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer": {"layers": 1},
    "dropout, rope, grouped heads, no bias": {"dropout": 0.2, "positions": "rope", "kv_heads": 2, "bias": False},
    "crystalline, dropout": {"dropout": 0.1, "lattice": EVERY_TERM},
}
BACKENDS = [("numpy", "fp32"), ("native", "fp32"), ("simulator", "fp32"), ("simulator", "bf16")]
ROUNDED_TWICE = 2.0**-8
"""Of the gradients, in bf16, where what is computed again was computed from numbers before they were rounded to 8 bits:
an average rounding is 2^-9 of a number, and it is made in layer norms and GELU."""
AGAIN = [level for level in LEVELS if level != "none"]


def _backend(name: str, precision: Precision, workers: int = 1) -> Backend:
    if name != "numpy" and find_compiler() is None:
        pytest.skip(f"not run: {name} needs a C++ compiler")
    return get_backend(name, workers=workers, precision=precision)


def _model(a: Architecture, backend: Backend, dtype: Any = None) -> Transformer:
    layout = Layout(parameter_specs(a), dtype or backend.dtype)
    model = Transformer(a, backend, layout.views(backend.zeros(layout.size, layout.dtype)))
    model.parameters.flat[...] = backend.asarray(random_point(layout, 7).astype(layout.dtype))
    return model


def _gradients(model: Transformer, recompute: Recompute, *, batch: int = 4, step: Any = 3) -> tuple[float, Any]:
    """Loss and gradients of two micro-batches added up, the second of which begins where the first ends."""
    a, backend, layout = model.architecture, model.backend, model.parameters.layout
    drawn = np.random.default_rng(2).integers(a.vocabulary, size=(2, 2 * batch, a.context), dtype=np.int32)
    drawn[1, ::2, 3] = IGNORE_INDEX
    gradients = layout.views(backend.zeros(layout.size, layout.dtype))
    gradients.flat[...] = 3.0  # what is overwritten does not matter
    total = 0.0
    with GradientWorkers(model, batch, a.context, recompute=recompute) as workers:
        for activations in workers.activations:
            _spoil(activations)
        for first in (0, batch):
            rows = slice(first, first + batch)
            tokens, targets = (backend.asarray(np.ascontiguousarray(x[rows])) for x in drawn)
            mask = Dropout(a.dropout, 11, step, 0, first_element=first * a.context * a.width) if a.dropout else None
            total += workers.loss_and_gradients(
                tokens, targets, gradients, gradient_scale=0.125, accumulate=first > 0, dropout=mask
            )
    return total, backend.to_host(gradients.flat).copy()


def _spoil(activations: Activations) -> None:
    """NaN wherever a layer may keep something, so that nothing is read before it is written."""
    for layer in activations.names:
        for array in vars(activations[layer]).values():
            if array is not None:
                array[...] = np.nan


def _distance(got: Any, want: Any) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("level", AGAIN)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "precision"), BACKENDS)
def test_the_gradients_have_the_same_bits(name: str, precision: Precision, model: str, level: Recompute) -> None:
    built = _model(dataclasses.replace(BASE, **MODELS[model]), _backend(name, precision))
    loss, gradients = _gradients(built, "none")
    again, same = _gradients(built, level)
    assert again == loss
    assert np.isfinite(gradients.astype(np.float32)).all()
    assert np.count_nonzero(gradients) > 0.9 * gradients.size
    np.testing.assert_array_equal(same.view(np.uint8), gradients.view(np.uint8))


@pytest.mark.parametrize("level", AGAIN)
def test_the_reference_in_bf16_takes_its_norms_of_rounded_sums(
    level: Recompute, within: Callable[[str, float, float], None]
) -> None:
    """Its residual addition and layer norm are one operation, which rounds what it writes and not what lies between."""
    model = _model(dataclasses.replace(BASE, dropout=0.1), _backend("numpy", "bf16"))
    loss, gradients = _gradients(model, "none")
    again, near = _gradients(model, level)
    assert again == loss
    within("gradients", _distance(near, gradients), ROUNDED_TWICE)


@pytest.mark.parametrize("level", AGAIN)
def test_gelu_in_an_epilogue(level: Recompute, within: Callable[[str, float, float], None]) -> None:
    """cuBLASLt's, by a stand-in: whole blocks run the same products again, GELU alone sees the rounded numbers."""
    launcher = launcher_with(StandIn(), kernels=simulator_or_skip())
    backend = Backend("simulator", np, cuda_operations(launcher, Ranges()), "products as the test says")
    model = _model(BASE, backend, BFLOAT16)
    loss, gradients = _gradients(model, "none")
    again, near = _gradients(model, level)
    assert again == loss
    if level == "block":
        np.testing.assert_array_equal(near, gradients)
    else:
        within("gradients", _distance(near, gradients), ROUNDED_TWICE)


@pytest.mark.parametrize("level", AGAIN)
def test_two_workers(level: Recompute) -> None:
    model = _model(dataclasses.replace(BASE, dropout=0.3), _backend("native", "fp32", workers=2))
    np.testing.assert_array_equal(_gradients(model, level, batch=5)[1], _gradients(model, "none", batch=5)[1])


def test_the_last_block_is_not_run_again() -> None:
    """Its arrays are as its forward left them: of three blocks two run again, of one none."""
    for layers, level, again in ((3, "block", 2), (3, "pointwise", 0), (1, "block", 0)):
        backend, calls = _backend("numpy", "fp32"), []

        def counted(*arguments: Any, forward: Any = backend.ops.attention_forward, seen: Any = calls, **n: Any) -> None:
            seen.append(forward(*arguments, **n))

        ops = backend.ops.replace(attention_forward=counted)
        model = _model(dataclasses.replace(BASE, layers=layers), dataclasses.replace(backend, ops=ops))
        _gradients(model, level)
        assert len(calls) == 2 * (layers + again)


# ---- what it saves


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model", MODELS)
def test_the_plan_is_what_is_allocated(model: str, level: Recompute, backend: Backend) -> None:
    a, asked = dataclasses.replace(BASE, **MODELS[model]), []

    def empty_bytes(size: int) -> Any:
        asked.append(size)
        return np.empty(size, np.uint8)

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return empty_bytes if name == "empty_bytes" else getattr(backend, name)

    activations = Activations(a, Counting(), 3, 7, np.float32, training=True, recompute=level)
    plan = plan_activations(a, 3, 7, np.float32, training=True, recompute=level)
    assert asked == [activations.bytes] == [plan.bytes]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_plan_of_a_run_names_every_level(backend: Backend, workers: int) -> None:
    backend = dataclasses.replace(backend, workers=workers)
    a = dataclasses.replace(BASE, dropout=0.1)
    for level in LEVELS:
        loop = TrainingConfig(batch=10, micro_batch=5, recompute=level)
        plan = plan_memory(Config(model=ModelConfig.of(a), training=loop), a, backend)
        with GradientWorkers(_model(a, backend), 5, a.context, recompute=level) as own:
            assert plan.activations == sum(activations.bytes for activations in own.activations)
        assert (plan.recompute, dict(plan.activations_at)[level]) == (level, plan.activations)
        assert [name for name, _ in plan.activations_at] == list(LEVELS)
    none, pointwise, block = (size for _, size in plan.activations_at)
    assert none > pointwise > block


def test_what_a_layer_more_costs() -> None:
    """By hand, in bytes for each row of float32: C = 32, M = 56, H = 4; a few numbers per row."""

    def bytes_of(layers: int, level: Recompute) -> int:
        a = dataclasses.replace(BASE, layers=layers)
        return plan_activations(a, 32, 12, np.float32, training=True, recompute=level).bytes

    streams, qkv, attended, mlp, numbers = 2 * 32, 3 * 32, 32, 56, 4 + 4
    everything = streams + 2 * 32 + qkv + attended + 2 * mlp + numbers
    for level, kept in (("none", everything), ("pointwise", everything - 2 * 32 - mlp), ("block", 32)):
        assert bytes_of(5, level) - bytes_of(4, level) == 4 * kept * 32 * 12


def test_attention_weights_need_queries_and_keys(backend: Backend) -> None:
    model = _model(BASE, backend)
    activations = Activations(BASE, backend, 1, 12, np.float32, training=True, recompute="block")
    model.logits(activations, np.zeros((1, 12), np.int32))
    with pytest.raises(ValueError, match="recompute 'block' keep no queries and keys"):
        model.attention_weights(activations, 0)
    inference = Activations(BASE, backend, 1, 12, np.float32, training=False)
    model.logits(inference, np.zeros((1, 12), np.int32))
    with pytest.raises(ValueError, match="training=False are shared by the blocks"):
        model.attention_weights(inference, 0)
