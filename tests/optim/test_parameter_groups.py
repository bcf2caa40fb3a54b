"""Parameter groups: the segments of a layout, and what steps them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cllm_gpu.backend import Backend
from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.parameters import Layout, ParameterSpec, parameter_specs
from cllm_gpu.optim.optimizer import RULES, Optimizer, optimizer_bytes, state_names
from cllm_gpu.optim.parameter_groups import ParameterGroup, Segment, parameter_groups, segments
from cllm_gpu.optim.sgd import SGD

SPECS = [
    ParameterSpec("embedding", (5, 7)),
    ParameterSpec("weight", (3, 3)),
    ParameterSpec("gain", (7,)),
    ParameterSpec("points", (9, 3), start="lattice", lattice=True),
    ParameterSpec("scalars", (2, 3), lattice=True),
]
ARCHITECTURE = Architecture(vocabulary=23, context=9, layers=2, heads=3, kv_heads=3, width=18, mlp_width=29)


def test_a_models_groups_are_two_segments() -> None:
    """Matrices, then what has no decay, in one call; the lattice's scalars, at their own rate, in another."""
    config = OptimizerConfig(name="adam", lattice_rate=7.0)
    layout = Layout(SPECS, np.float32)
    places = layout.offsets
    assert segments(layout, parameter_groups(config)) == (
        Segment(slice(0, places["scalars"]), "adam", 1.0, decayed=places["gain"]),
        Segment(slice(places["scalars"], layout.size), "adam", 7.0, decayed=0),
    )


@pytest.mark.parametrize("lattice", [None, LatticeTerms(), LatticeTerms(learned_points=True, prime_distance=True)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_segments_cover_a_model_once(lattice: LatticeTerms | None, dtype: type) -> None:
    layout = Layout(parameter_specs(dataclasses.replace(ARCHITECTURE, lattice=lattice)), dtype)
    found = segments(layout, parameter_groups(OptimizerConfig()))
    assert len(found) == (1 if lattice is None else 2)
    assert [segment.part.start for segment in found] == [0, *(segment.part.stop for segment in found[:-1])]
    assert found[-1].part.stop == layout.size
    decayed = {name for name, spec in layout.specs.items() if spec.decayed}
    assert {name for name, place in layout.offsets.items() if place < found[0].decayed} == decayed


def test_a_further_group_is_one_predicate() -> None:
    """A rate of its own for one layer: what lies before and behind it is stepped by itself, and nothing is lost."""
    layout = Layout(SPECS, np.float32)
    own = ParameterGroup(lambda spec: spec.name == "weight", "adamw", rate_multiple=0.5, weight_decay=True)
    found = segments(layout, (own, *parameter_groups(OptimizerConfig(lattice_rate=2.0))))
    places = [*layout.offsets.values(), layout.size]
    assert [(segment.part.start, segment.rate_multiple) for segment in found] == [
        (places[0], 1.0),
        (places[1], 0.5),
        (places[2], 1.0),
        (places[4], 2.0),
    ]
    assert [segment.decayed for segment in found] == [places[1], places[2] - places[1], 0, 0]


def test_decay_behind_what_has_none_begins_a_segment() -> None:
    """Within a call weight decay applies to a prefix."""
    layout = Layout([ParameterSpec("gain", (7,)), ParameterSpec("weight", (3, 3))], np.float32)
    assert [segment.decayed for segment in segments(layout, parameter_groups(OptimizerConfig()))] == [0, 32]


def test_a_rule_is_told_where_matrices_lie() -> None:
    """Parameters of a segment, in their shapes, are what they are in the whole layout."""
    layout = Layout(SPECS, np.float32)
    own = ParameterGroup(lambda spec: spec.name == "weight", "adamw", rate_multiple=0.5)
    flat, found = np.arange(layout.size), {}
    for segment in segments(layout, (own, *parameter_groups(OptimizerConfig()))):
        for place, shape in layout.shapes(segment.part):
            part = flat[segment.part][place].reshape(shape)
            found[part.flat[0]] = part
    for name, view in layout.views(flat).items():
        np.testing.assert_array_equal(found.pop(view.flat[0]), view, err_msg=name)
    assert not found


class OfMatrices(SGD):
    """Steps one matrix, and leaves the rest to Adam."""

    @classmethod
    def groups(cls, config: OptimizerConfig) -> tuple[ParameterGroup, ...]:
        own = ParameterGroup(lambda spec: spec.name == "weight", "of_matrices", weight_decay=True)
        return (own, *parameter_groups(dataclasses.replace(config, name="adam")))  # type: ignore[arg-type]


def test_a_rule_may_leave_parameters_to_another(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setitem(RULES, "of_matrices", OfMatrices)
    config = OptimizerConfig(name="of_matrices", rate=0.5, momentum=0.0, clip_norm=0.0)  # type: ignore[arg-type]
    layout = Layout(SPECS, np.float32)
    optimizer = Optimizer(config, backend, layout)
    assert set(optimizer.state) == set(state_names(config)) == {"first_moment", "second_moment"}
    parameters, gradients = (layout.views(backend.zeros(layout.size, np.float32)) for _ in range(2))
    gradients.flat[...] = 3.0
    optimizer.apply(parameters, gradients, rate=0.5, gradient_norm=optimizer.gradient_norm(gradients))
    assert (parameters["weight"] == -1.5).all()
    assert not optimizer.state["second_moment"]["weight"].any()
    np.testing.assert_allclose(parameters["embedding"], -0.5, rtol=1e-6)


def test_a_parameter_in_no_group_is_an_error() -> None:
    groups = parameter_groups(OptimizerConfig())[:2]
    with pytest.raises(ValueError, match="parameter gain is in no parameter group"):
        segments(Layout(SPECS, np.float32), groups)


def test_two_update_rules_in_one_optimizer(backend, monkeypatch) -> None:
    """SGD for the matrices, AdamW for the rest: each part as by an optimizer of that rule alone."""
    config = OptimizerConfig(name="adamw", clip_norm=0.0, weight_decay=0.1)
    moved = {}
    for name in ("sgd", "adamw", "both"):
        chosen = dataclasses.replace(config, name="sgd" if name == "sgd" else "adamw")
        if name == "both":
            matrices = ParameterGroup(lambda spec: spec.decayed, "sgd", weight_decay=True)
            groups = (matrices, *parameter_groups(config))
            monkeypatch.setattr("cllm_gpu.optim.update_rule.parameter_groups", lambda _, groups=groups: groups)
        layout = Layout(SPECS, np.float64)
        generator = np.random.default_rng(3)
        parameters, gradients = (layout.views(backend.zeros(layout.size, np.float64)) for _ in range(2))
        for views in (parameters, gradients):
            for view in views.values():
                view[...] = generator.standard_normal(view.shape)
        optimizer = Optimizer(chosen, backend, layout)
        for _ in range(3):
            norm = optimizer.gradient_norm(gradients)
            assert optimizer.apply(parameters, gradients, rate=0.01, gradient_norm=norm).applied
        moved[name] = parameters
    assert state_names(config) == tuple(optimizer.state) == ("velocity", "first_moment", "second_moment")
    assert optimizer_bytes(config, layout) == 3 * layout.bytes
    assert optimizer.device_obstacle is not None
    for spec in SPECS:
        alone = moved["sgd" if spec.decayed else "adamw"]
        np.testing.assert_array_equal(moved["both"][spec.name], alone[spec.name])
