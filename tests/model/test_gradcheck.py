"""The gradient check passes what is right and fails, in the right group, every backward that is wrong."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.gradcheck import BOUND, check_gradients, iterate_checks, random_point, relative_error
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.utils.errors import UserError

SHAPE = Architecture(vocabulary=11, context=7, layers=2, heads=2, kv_heads=2, width=12, mlp_width=20)
VARIANTS = {
    "tied, learned": {},
    "untied, rope, one key head": {"positions": "rope", "tied_head": False, "kv_heads": 1},
    "dropout": {"dropout": 0.2},
    "no bias": {"bias": False},
    "one token": {"context": 1},
    "one layer, odd": {"layers": 1, "heads": 3, "kv_heads": 3, "width": 21, "mlp_width": 5, "vocabulary": 3},
    "narrow": {"heads": 1, "kv_heads": 1, "width": 4, "mlp_width": 1},
    "no width": {"heads": 1, "kv_heads": 1, "width": 1, "mlp_width": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_group_of_a_right_model_passes(name, backend):
    a = dataclasses.replace(SHAPE, **VARIANTS[name])
    checks = check_gradients(a, backend, batch=3, seed=1)
    assert [check.name for check in checks] == [spec.name for spec in parameter_specs(a)]
    assert [check.size for check in checks] == [spec.size for spec in parameter_specs(a)]
    for check in checks:
        assert check.passed, check
        assert check.relative_error <= BOUND
    if a.width > 1:  # layer norm of one element is constant: there every gradient before the last is zero
        assert min(abs(check.analytic) for check in checks) > 1e-3, "a gradient this small would be hard to resolve"


def test_a_seed_decides_the_check(backend):
    first, again, other = (check_gradients(SHAPE, backend, seed=seed, length=3) for seed in (1, 1, 2))
    assert first == again
    assert [c.analytic for c in first] != [c.analytic for c in other]


def wrong(backend, operation, change):
    """The backend with `operation` replaced by one whose results `change(arguments)` spoils after the fact."""
    right = getattr(backend.ops, operation)

    def spoilt(*arguments, **named):
        right(*arguments, **named)
        change(arguments)

    return dataclasses.replace(backend, ops=backend.ops.replace(**{operation: spoilt}))


def scale(position):
    """One output of an operation 1% too large (linear in it, so accumulated gradients are spoilt too)."""

    def change(arguments):
        if arguments[position] is not None:
            arguments[position][...] *= 1.01

    return change


def flip(position):
    def change(arguments):
        if arguments[position] is not None:
            arguments[position][...] *= -1.5  # not −1: two wrong signs on one road would cancel

    return change


NORMS = {"blocks.0.attention_norm", "blocks.0.mlp_norm", "final_norm"}
# operation, argument that is spoilt, groups that must fail, groups that must still pass
CASES = {
    "linear dx": ("linear_backward", 3, {"blocks.0.qkv.weight", "token_embedding"}, {"head"}),
    "linear dweight": ("linear_backward", 4, {"blocks.0.qkv.weight", "head"}, {"blocks.0.qkv.bias", "final_norm.bias"}),
    "linear dbias": (
        "linear_backward",
        5,
        {"blocks.0.qkv.bias", "blocks.0.projection.bias"},
        {"head", "token_embedding"},
    ),
    "mlp dx": ("mlp_backward", 7, {"blocks.0.qkv.weight", "token_embedding"}, {"head", "blocks.0.mlp_up.weight"}),
    "mlp dup_weight": ("mlp_backward", 8, {"blocks.0.mlp_up.weight"}, {"blocks.0.mlp_up.bias", "token_embedding"}),
    "mlp dup_bias": ("mlp_backward", 9, {"blocks.0.mlp_up.bias"}, {"blocks.0.mlp_up.weight"}),
    "mlp ddown_weight": ("mlp_backward", 10, {"blocks.0.mlp_down.weight"}, {"blocks.0.mlp_up.weight", "head"}),
    "mlp ddown_bias": ("mlp_backward", 11, {"blocks.0.mlp_down.bias"}, {"blocks.0.mlp_down.weight"}),
    "norm dx": ("layernorm_backward", 6, {"blocks.0.mlp_down.weight"}, {"final_norm.weight", "head"}),
    "norm dweight": ("layernorm_backward", 8, {f"{n}.weight" for n in NORMS}, {f"{n}.bias" for n in NORMS}),
    "norm dbias": ("layernorm_backward", 9, {f"{n}.bias" for n in NORMS}, {f"{n}.weight" for n in NORMS}),
    "attention dq": ("attention_backward", 6, {"blocks.0.qkv.weight"}, {"blocks.0.projection.weight"}),
    "attention dk": ("attention_backward", 7, {"blocks.0.qkv.weight"}, {"blocks.0.projection.weight"}),
    "attention dv": ("attention_backward", 8, {"blocks.0.qkv.weight"}, {"blocks.0.projection.weight"}),
    "rotary": ("rotary_backward", 0, {"blocks.0.qkv.weight"}, {"blocks.0.projection.weight"}),
    "embedding tokens": ("embedding_backward", 2, {"token_embedding"}, {"blocks.0.qkv.weight"}),
    "embedding positions": ("embedding_backward", 3, {"position_embedding"}, {"token_embedding"}),
    "dropout": (
        "layernorm_backward",
        7,
        {"blocks.0.projection.weight", "token_embedding"},
        {"head", "final_norm.bias"},
    ),
    "loss": ("cross_entropy", 0, {"head", "final_norm.weight", "token_embedding"}, set()),
}


@pytest.mark.parametrize("spoil", [scale, flip])
@pytest.mark.parametrize("case", CASES)
def test_a_wrong_backward_is_caught_in_its_groups(case, spoil, backend):
    operation, position, failing, passing = CASES[case]
    rope = operation == "rotary_backward"
    a = dataclasses.replace(SHAPE, layers=1, tied_head=False, positions="rope" if rope else "learned")
    a = dataclasses.replace(a, dropout=0.2 if case == "dropout" else 0.0)
    spoilt = wrong(backend, operation, spoil(position))
    results = {check.name: check for check in check_gradients(a, spoilt, length=4, directions=1)}
    failed = {name for name, check in results.items() if not check.passed}
    assert failing <= failed
    assert not passing & failed
    for name in failing:  # 1% of one part of a group is far above the bound
        assert results[name].relative_error > 100 * BOUND


@pytest.mark.parametrize("element", [0, 17, 143])
def test_one_wrong_element_is_caught(element, backend):
    """An error of a thousandth of the group's norm in one element of 144 moves a direction by 1e-3/√144 or so."""

    def change(arguments):
        dweight = arguments[4]
        if dweight.shape == (12, 12):
            dweight.reshape(-1)[element] += 1e-3 * np.linalg.norm(dweight)

    failed = {c.name for c in check_gradients(SHAPE, wrong(backend, "linear_backward", change)) if not c.passed}
    assert failed == {"blocks.0.projection.weight", "blocks.1.projection.weight"}


def test_a_gradient_never_written_is_caught(backend):
    """A backward that forgets its weights' gradient leaves zeros: no direction along the gradient exists then."""

    def change(arguments):
        arguments[8][...] = 0.0

    failed = {c.name for c in check_gradients(SHAPE, wrong(backend, "layernorm_backward", change)) if not c.passed}
    assert failed == {spec.name for spec in parameter_specs(SHAPE) if spec.name.endswith("norm.weight")}


def test_a_gradient_that_is_not_finite_is_caught(backend):
    def change(arguments):
        arguments[8][0] = np.nan

    checks = check_gradients(SHAPE, wrong(backend, "layernorm_backward", change), length=3)
    assert {c.name for c in checks if not c.passed} == {c.name for c in checks if c.name.endswith("norm.weight")}


def test_relative_error():
    assert relative_error(1.0, 1.5, 0.0) == pytest.approx(1 / 3)
    assert relative_error(0.0, 0.0, 0.0) == 0
    assert relative_error(1e-12, -1e-12, 1e-11) == 0
    assert relative_error(0.0, 1e-3, 1e-11) == 1
    assert math.isnan(relative_error(math.nan, 1.0, 1e-11))
    assert math.isnan(relative_error(1.0, math.nan, 1e-11))


def test_the_point_is_no_special_one():
    layout = Layout(parameter_specs(SHAPE), np.float64)
    point = layout.views(random_point(layout, 1))
    for name, values in point.items():
        assert np.unique(values).size == values.size, name
        assert (values != 0).all(), name


def test_checks_come_one_by_one(backend):
    checks = iterate_checks(SHAPE, backend, length=2, directions=1)
    assert next(checks).name == parameter_specs(SHAPE)[0].name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch"),
        ({"directions": 0}, "directions"),
        ({"length": 8}, "context 7"),
        ({"length": 0}, "length 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message, backend):
    with pytest.raises(UserError, match=message):
        check_gradients(SHAPE, backend, **sizes)
