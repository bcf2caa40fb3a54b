"""Optimizers: one step on every parameter, clipping, decay of matrices only, refusal, state, memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.layers.layer import ParameterSpec
from cllm_gpu.model.parameters import Layout
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.optim.optimizer import Optimizer, optimizer_bytes, state_names

SPECS = [
    ParameterSpec("embedding", (5, 7), 0.02),
    ParameterSpec("weight", (3, 3), 0.02),
    ParameterSpec("gain", (7,), start=1.0),
    ParameterSpec("bias", (3,)),
]
CONFIGS = [
    OptimizerConfig(name="sgd", momentum=0.0),
    OptimizerConfig(name="sgd"),
    OptimizerConfig(name="adam"),
    OptimizerConfig(name="adamw"),
]
IDS = ["sgd", "momentum", "adam", "adamw"]


class Setting:
    """Parameters and gradients drawn once, with an optimizer for them."""

    def __init__(self, config, backend, dtype=np.float64, size=1.0):
        generator = np.random.default_rng(7)
        self.layout = Layout(SPECS, dtype)
        self.parameters = self.layout.views(backend.zeros(self.layout.size, dtype))
        self.gradients = self.layout.views(backend.zeros(self.layout.size, dtype))
        for name in self.parameters:
            self.parameters[name][...] = generator.standard_normal(self.parameters[name].shape)
            self.gradients[name][...] = size * generator.standard_normal(self.gradients[name].shape)
        self.optimizer = Optimizer(config, backend, self.layout)

    def step(self, rate=0.01):
        norm = self.optimizer.gradient_norm(self.gradients)
        return self.optimizer.apply(self.parameters, self.gradients, rate=rate, gradient_norm=norm)

    def everything(self):
        arrays = {"parameters": self.parameters, **self.optimizer.state}
        return {name: flat.flat.copy() for name, flat in arrays.items()}, self.optimizer.updates


def changed(config, **values):
    return OptimizerConfig(**{**config.__dict__, **values})


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_one_step_moves_every_parameter_and_no_padding(config, backend):
    s = Setting(config, backend)
    before = s.parameters.flat.copy()
    report = s.step()
    assert report.applied
    assert s.optimizer.updates == 1
    used = np.zeros(s.layout.size, bool)
    for view in s.layout.views(used).values():
        view[...] = True
    assert np.all((s.parameters.flat != before) == used)
    for flat in s.optimizer.state.values():
        assert np.all(flat.flat[~used] == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sgd_moves_by_exactly_minus_rate_times_gradient(dtype, backend):
    s = Setting(OptimizerConfig(name="sgd", momentum=0.0, clip_norm=0.0), backend, dtype)
    expected = s.parameters.flat - s.gradients.flat * dtype(0.125)
    s.step(rate=0.125)
    np.testing.assert_array_equal(s.parameters.flat, expected)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_report_gives_both_norms(config, backend):
    s = Setting(config, backend)
    norm = math.sqrt(sum(float(np.sum(g * g)) for g in s.gradients.values()))
    before = s.parameters.flat.copy()
    report = s.step()
    assert report.gradient_norm == pytest.approx(norm, rel=1e-14)
    # the update is what was subtracted, up to the rounding of the parameters
    assert report.update_norm == pytest.approx(float(np.linalg.norm(s.parameters.flat - before)), rel=1e-12)


@pytest.mark.parametrize(("clip", "size"), [(0.5, 1.0), (0.5, 1e-3), (0.0, 1.0)])
def test_clipping_scales_the_whole_gradient_when_its_norm_is_too_large(clip, size, backend):
    s = Setting(OptimizerConfig(name="sgd", momentum=0.0, clip_norm=clip), backend, size=size)
    norm = s.optimizer.gradient_norm(s.gradients)
    report = s.step(rate=1.0)
    assert report.gradient_norm == norm  # before clipping
    assert report.update_norm == pytest.approx(min(norm, clip) if clip else norm, rel=1e-5)  # 1e-6 is in the formula


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_weight_decay_reaches_matrices_only(config, backend):
    plain, decayed = Setting(config, backend), Setting(changed(config, weight_decay=0.5), backend)
    plain.step()
    decayed.step()
    for name, spec in plain.layout.specs.items():
        assert np.all((plain.parameters[name] != decayed.parameters[name]) == (len(spec.shape) == 2)), name


def test_decay_is_decoupled_in_adamw_only(backend):
    """AdamW's first step takes rate·decay·p off a matrix; Adam's is ±rate whatever the decay adds to the gradient."""
    start = Setting(CONFIGS[3], backend).parameters["weight"].copy()
    moved = {}
    for name in ("adam", "adamw"):
        plain = Setting(OptimizerConfig(name=name, clip_norm=0), backend)
        decayed = Setting(OptimizerConfig(name=name, clip_norm=0, weight_decay=0.5), backend)
        plain.step()
        decayed.step()
        moved[name] = plain.parameters["weight"] - decayed.parameters["weight"]
    np.testing.assert_allclose(moved["adamw"], 0.01 * 0.5 * start, atol=1e-15)
    assert np.all((np.abs(moved["adam"]) < 1e-8) | (np.abs(np.abs(moved["adam"]) - 0.02) < 1e-8))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_nothing(config, clip, bad, backend):
    s = Setting(changed(config, clip_norm=clip), backend)
    s.step()
    arrays, updates = s.everything()
    s.gradients["bias"][1] = bad
    report = s.step()
    assert not report.applied
    assert report.update_norm == 0
    assert not math.isfinite(report.gradient_norm)
    after, updates_after = s.everything()
    assert updates == updates_after == 1
    for name, array in arrays.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_a_gradient_whose_square_overflows_is_refused_or_clipped(name, backend):
    """g² of 1e20 is infinite in float32: taken in, the second moment would stay infinite for good."""
    unclipped = Setting(OptimizerConfig(name=name, clip_norm=0), backend, np.float32, size=1e20)
    assert not unclipped.step().applied
    assert unclipped.optimizer.updates == 0
    clipped = Setting(OptimizerConfig(name=name, clip_norm=1.0), backend, np.float32, size=1e20)
    assert clipped.step().applied
    assert all(np.all(np.isfinite(flat.flat)) for flat in clipped.optimizer.state.values())


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_the_lattices_scalars_have_a_rate_of_their_own(config, backend):
    """A step on scalars is one of the same optimizer at lattice_rate times the rate; the others do not notice."""
    specs = [*SPECS, ParameterSpec("scalars", (2, 3), lattice=True)]
    plain = [*SPECS, ParameterSpec("scalars", (6,))]
    config = changed(config, weight_decay=0.3, clip_norm=0.0, lattice_rate=7.0)
    moved = {}
    for name, chosen, rate in (("own", specs, 0.01), ("ordinary", plain, 0.01), ("raised", plain, 0.07)):
        layout = Layout(chosen, np.float64)
        parameters, gradients = (layout.views(backend.zeros(layout.size, np.float64)) for _ in range(2))
        generator = np.random.default_rng(3)
        for views in (parameters, gradients):
            for view in views.values():
                view[...] = generator.standard_normal(view.size).reshape(view.shape)
        optimizer = Optimizer(config, backend, layout)
        optimizer.apply(parameters, gradients, rate=rate, gradient_norm=optimizer.gradient_norm(gradients))
        moved[name] = {group: view.reshape(-1).copy() for group, view in parameters.items()}
    for spec in SPECS:
        np.testing.assert_array_equal(moved["own"][spec.name], moved["ordinary"][spec.name])
    np.testing.assert_allclose(moved["own"]["scalars"], moved["raised"]["scalars"], rtol=1e-14)
    assert np.abs(moved["own"]["scalars"] - moved["ordinary"]["scalars"]).max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_state_and_count_are_all_a_resumed_run_needs(config, backend):
    whole = Setting(config, backend, np.float32)
    for _ in range(6):
        whole.step()
    first, second = Setting(config, backend, np.float32), Setting(config, backend, np.float32)
    for _ in range(3):
        first.step()
    second.parameters.flat[...] = first.parameters.flat
    for name, flat in first.optimizer.state.items():
        second.optimizer.state[name].flat[...] = flat.flat
    second.optimizer.updates = first.optimizer.updates
    for _ in range(3):
        second.step()
    (a, count), (b, resumed) = whole.everything(), second.everything()
    assert count == resumed == 6
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_bytes_and_names_are_those_of_what_is_allocated(config, backend):
    s = Setting(config, backend)
    assert tuple(s.optimizer.state) == state_names(config)
    allocated = sum(flat.flat.nbytes for flat in s.optimizer.state.values())
    assert optimizer_bytes(config, s.layout) == allocated
    assert allocated == {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[IDS[CONFIGS.index(config)]] * s.layout.bytes


def test_a_step_allocates_no_array_the_size_of_the_model(backend):
    layout = Layout([ParameterSpec("weight", (1000, 2000))], np.float32)
    parameters, gradients = (layout.views(backend.zeros(layout.size, np.float32)) for _ in range(2))
    optimizer = Optimizer(OptimizerConfig(), backend, layout)
    tracemalloc.start()
    try:
        optimizer.apply(parameters, gradients, rate=0.1, gradient_norm=optimizer.gradient_norm(gradients))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < layout.bytes / 5  # a few tiles of 128 KB against 8 MB


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_masters_take_the_step_of_float32_and_the_parameters_are_their_rounding(config, backend):
    """The same as in float32 from the same (bfloat16) weights and gradients, to the bit."""
    config = changed(config, weight_decay=0.1)
    narrow, wide = Setting(config, backend, BFLOAT16), Setting(config, backend, np.float32)
    for name in wide.parameters:
        wide.parameters[name][...] = narrow.parameters[name]
        wide.gradients[name][...] = narrow.gradients[name]
    for _ in range(3):
        assert narrow.step(rate=1e-3) == wide.step(rate=1e-3)
    masters = narrow.optimizer.masters
    for name, want in wide.parameters.items():
        np.testing.assert_array_equal(masters[name], want, strict=True)
        np.testing.assert_array_equal(narrow.parameters[name], want.astype(BFLOAT16), strict=True)
        for moment, state in wide.optimizer.state.items():
            np.testing.assert_array_equal(narrow.optimizer.state[moment][name], state[name], strict=True)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_without_masters_a_step_is_rounded_to_a_neighbour(config, backend):
    alone = Setting(changed(config, master_weights=False), backend, BFLOAT16)
    beside = Setting(config, backend, BFLOAT16)
    assert alone.optimizer.masters is None
    alone.step(rate=1e-3)
    beside.step(rate=1e-3)
    got, want = alone.parameters.flat.astype(np.float64), beside.optimizer.masters.flat.astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(want), 1e-30))) - 7)
    assert np.all(np.abs(got - want) < ulp)
    assert np.any(got != beside.parameters.flat.astype(np.float64)), "nothing was rounded away from its nearest"
    seeded = Optimizer(changed(config, master_weights=False), backend, alone.layout, seed=2)
    other = Setting(config, backend, BFLOAT16).parameters
    seeded.apply(other, alone.gradients, rate=1e-3, gradient_norm=seeded.gradient_norm(alone.gradients))
    assert np.any(other.flat != alone.parameters.flat), "the seed changes nothing"


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_bytes_of_bfloat16_training(config, masters, backend):
    """Moments and masters are float32: twice the size of the parameters each."""
    s = Setting(changed(config, master_weights=masters), backend, BFLOAT16)
    arrays = [*s.optimizer.state.values(), *([s.optimizer.masters] if masters else [])]
    assert optimizer_bytes(s.optimizer.config, s.layout) == sum(flat.flat.nbytes for flat in arrays)
    moments = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[IDS[CONFIGS.index(config)]]
    assert sum(flat.flat.nbytes for flat in arrays) == 2 * (moments + masters) * s.layout.bytes
    assert all(flat.flat.dtype == np.float32 for flat in arrays)


def test_the_places_of_masters_are_those_of_the_parameters(backend):
    s = Setting(CONFIGS[3], backend, BFLOAT16)
    assert s.optimizer.masters.layout.offsets == s.layout.offsets
    assert (s.optimizer.masters.layout.size, s.layout.dtype) == (s.layout.size, BFLOAT16)
    assert s.layout.widened().dtype == np.float32
    assert Layout(SPECS, np.float64).widened().dtype == np.float64


@pytest.mark.parametrize("masters", [True, False])
def test_a_non_finite_gradient_of_bfloat16_changes_nothing(masters, backend):
    s = Setting(changed(CONFIGS[3], master_weights=masters), backend, BFLOAT16)
    s.step()
    arrays, updates = s.everything()
    exact = s.optimizer.weights(s.parameters).flat.copy()
    s.gradients["bias"][1] = math.inf
    assert not s.step().applied
    after, updates_after = s.everything()
    assert updates == updates_after
    np.testing.assert_array_equal(s.optimizer.weights(s.parameters).flat, exact)
    for name, array in arrays.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_gradient_that_float32_cannot_square_is_refused_in_bfloat16(backend):
    """The moments are float32: their range decides, not that of the parameters."""
    s = Setting(OptimizerConfig(clip_norm=0), backend, BFLOAT16, size=1e20)
    assert not s.step().applied
    assert s.optimizer.updates == 0
