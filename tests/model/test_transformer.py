"""The whole model: derivatives of every parameter, accumulation, chunks of logits, caches, start, memory."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.model.activations import Activations, plan_activations
from cllm_gpu.model.architecture import SIZES, Architecture, LatticeTerms
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.model.layers.layer import INITIAL_DEVIATION
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.attention import CPU_QUERY_BLOCK
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.optim.parameter_groups import parameter_groups, segments
from cllm_gpu.utils.errors import UserError

BASE = Architecture(vocabulary=23, context=9, layers=2, heads=3, kv_heads=3, width=18, mlp_width=29)
EVERY_TERM = LatticeTerms(matches=8, distance=True, prime_distance=True, symmetry_fraction=1.0, learned_points=True)
VARIANTS = {
    "tied-learned": {},
    "untied-rope": {"tied_head": False, "positions": "rope"},
    "no-bias": {"bias": False},
    "rope-no-bias-grouped": {"positions": "rope", "bias": False, "kv_heads": 1},
    "grouped-untied": {"heads": 6, "kv_heads": 2, "tied_head": False},
    "dropout": {"dropout": 0.3},
    "dropout-rope-grouped-untied": {"dropout": 0.2, "positions": "rope", "kv_heads": 1, "tied_head": False},
    "one-layer": {"layers": 1},
    "four-layers": {"layers": 4},
    "width-of-one-head": {"heads": 1, "kv_heads": 1, "width": 5, "mlp_width": 3},
    "crystalline": {"lattice": LatticeTerms()},
    "crystalline-all": {"lattice": EVERY_TERM},
    "crystalline-all-rope-grouped": {"lattice": EVERY_TERM, "positions": "rope", "kv_heads": 1},
    "crystalline-symmetry": {"lattice": LatticeTerms(matches=0, same_token=False, symmetry_fraction=0.7)},
    "crystalline-points": {"lattice": LatticeTerms(matches=0, prime_distance=True, learned_points=True)},
}
SHAPES = [(3, 7), (2, 1)]  # B, T


def variant(name):
    return dataclasses.replace(BASE, **VARIANTS[name])


def draw(a, batch, length, *, seed=5):
    """Tokens and targets (B, T) with an ignored target in every other sequence."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(a.vocabulary, size=(2, batch, length), dtype=np.int32)
    targets[::2, length // 2] = IGNORE_INDEX
    return tokens, targets


def mask(a):
    return Dropout(a.dropout, seed=11, step=4, site=0) if a.dropout else None


def run(model, gradients, tokens, targets, *, scale=1.0, accumulate=False, dropout=None, first_row=0):
    """Σ losses; gradients of scale·Σ."""
    dtype = model.parameters.layout.dtype
    w = Activations(model.architecture, model.backend, *tokens.shape, dtype, training=True, first_row=first_row)
    return model.loss_and_gradients(
        w, tokens, targets, gradients, gradient_scale=scale, accumulate=accumulate, dropout=dropout
    )


def loss_function(model, tokens, targets, *, scale=1.0, dropout=None):
    """f() = scale·Σ losses at the parameters' present values; only a pass with dropout needs the training path."""
    dtype = model.parameters.layout.dtype
    if dropout is None:
        w = Activations(model.architecture, model.backend, *tokens.shape, dtype, training=False)
        return lambda: scale * float(model.losses(w, tokens, targets)[0].sum())
    scratch = model.parameters.layout.views(np.empty_like(model.parameters.flat))
    return lambda: scale * run(model, scratch, tokens, targets, dropout=dropout)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=["B3T7", "B2T1"])
def test_gradients_are_the_derivatives(name, shape, build_model, gradient_error, within):
    a = variant(name)
    model, gradients = build_model(a)
    tokens, targets = draw(a, *shape)
    gradients.flat[...] = np.nan  # what is overwritten does not matter
    run(model, gradients, tokens, targets, scale=0.5, dropout=mask(a))
    f = loss_function(model, tokens, targets, scale=0.5, dropout=mask(a))
    for group, view in model.parameters.items():
        within(group, gradient_error(f, view, gradients[group], directions=1), 1e-7)


@pytest.mark.parametrize("name", ["tied-learned", "untied-rope", "dropout", "no-bias", "crystalline-all"])
def test_micro_batches_accumulate_to_one_batch(name, build_model, within):
    """The dropout of a part follows from where it stands in the whole batch. Sums in another order: a few roundings."""
    a = variant(name)
    model, whole = build_model(a)
    parts = whole.layout.views(np.full_like(whole.flat, np.nan))
    tokens, targets = draw(a, 6, 8)
    loss = run(model, whole, tokens, targets, dropout=mask(a))
    total = 0.0
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        total += run(
            model, parts, tokens[start:stop], targets[start:stop],
            accumulate=start > 0, dropout=mask(a), first_row=start * 8,
        )  # fmt: skip
    assert total == pytest.approx(loss, rel=1e-14)
    for group, gradient in whole.items():
        error = float(np.max(np.abs(parts[group] - gradient)))
        within(group, error, 100 * 2.2e-16 * float(np.max(np.abs(whole.flat))))


@pytest.mark.parametrize("name", ["tied-learned", "untied-rope"])
@pytest.mark.parametrize("rows", [1, 5, 23])
def test_chunks_of_logits_change_nothing(name, rows, build_model):
    a = variant(name)
    model, whole = build_model(a)
    tokens, targets = draw(a, 3, 8)
    loss = run(model, whole, tokens, targets)
    w = Activations(a, model.backend, 3, 8, np.float64, training=False)
    losses, hits = (x.copy() for x in model.losses(w, tokens, targets))
    model.backend = dataclasses.replace(model.backend, logit_chunks=LogitChunks(rows * a.vocabulary * 8 + 7))
    chunked = whole.layout.views(np.zeros_like(whole.flat))
    small = Activations(a, model.backend, 3, 8, np.float64, training=False)
    assert small["head"].logits.shape == (rows, a.vocabulary)
    assert run(model, chunked, tokens, targets) == pytest.approx(loss, rel=1e-14)
    np.testing.assert_allclose(chunked.flat, whole.flat, rtol=0, atol=1e-13)
    chunked_losses, chunked_hits = model.losses(small, tokens, targets)
    np.testing.assert_allclose(chunked_losses, losses, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(chunked_hits, hits)


def test_losses_and_hits_are_those_of_the_logits(build_model):
    a = variant("grouped-untied")
    model, gradients = build_model(a)
    tokens, targets = draw(a, 3, 7)
    w = Activations(a, model.backend, 3, 7, np.float64, training=False)
    logits = model.logits(w, tokens)
    assert logits.shape == (3, 7, a.vocabulary)
    targets[1] = logits[1].argmax(axis=-1)
    losses, hits = model.losses(w, tokens, targets)
    counted = targets.reshape(-1) != IGNORE_INDEX
    flat, chosen = logits.reshape(21, -1), np.where(counted, targets.reshape(-1), 0)
    expected = np.log(np.exp(flat).sum(axis=1)) - flat[np.arange(21), chosen]
    np.testing.assert_allclose(losses, np.where(counted, expected, 0), atol=1e-13)
    np.testing.assert_array_equal(hits, counted & (flat.argmax(axis=1) == chosen))
    assert hits[7:14].all()
    assert run(model, gradients, tokens, targets) == pytest.approx(float(losses.sum()), rel=1e-14)


@pytest.mark.parametrize(
    "name",
    [
        "tied-learned", "rope-no-bias-grouped", "grouped-untied", "four-layers",
        "crystalline", "crystalline-all-rope-grouped", "crystalline-symmetry",
    ],
)  # fmt: skip
@pytest.mark.parametrize("pieces", [[1] * 8, [3, 1, 4], [8]])
def test_a_cache_gives_the_logits_of_the_whole_sequence(name, pieces, build_model):
    a = variant(name)
    model, _ = build_model(a)
    tokens, _ = draw(a, 2, sum(pieces))
    full = model.logits(Activations(a, model.backend, 2, sum(pieces), np.float64, training=False), tokens)
    cache = KeyValueCache(a, model.backend, 2, a.context, np.float64)
    start = 0
    for piece in pieces:
        w = Activations(a, model.backend, 2, piece, np.float64, training=False)
        last = model.next_logits(w, tokens[:, start : start + piece], cache)
        start += piece
        assert cache.length == start
        np.testing.assert_allclose(last, full[:, start - 1], rtol=0, atol=1e-13)


def test_no_token_sees_a_later_one(build_model):
    for name in ("tied-learned", "untied-rope"):
        a = variant(name)
        model, _ = build_model(a)
        w = Activations(a, model.backend, 2, 8, np.float64, training=False)
        tokens, _ = draw(a, 2, 8)
        before = model.logits(w, tokens)
        tokens[:, 5] = (tokens[:, 5] + 1) % a.vocabulary
        after = model.logits(w, tokens)
        np.testing.assert_array_equal(after[:, :5], before[:, :5])
        assert np.all(np.any(after[:, 5:] != before[:, 5:], axis=-1))


def test_dropout_at_training_only_and_by_step(build_model):
    a = variant("dropout")
    model, gradients = build_model(a)
    tokens, targets = draw(a, 3, 7)
    plain = run(model, gradients, tokens, targets)
    with_mask = [run(model, gradients, tokens, targets, dropout=mask(a)) for _ in range(2)]
    other = run(model, gradients, tokens, targets, dropout=dataclasses.replace(mask(a), step=5))
    assert with_mask[0] == with_mask[1]
    assert len({plain, with_mask[0], other}) == 3


def test_float32_is_within_rounding_of_float64(build_model, within):
    """About 10 operations a layer, each with relative error √(width)·eps of its result's norm."""
    a = variant("four-layers")
    results = {}
    for dtype in (np.float32, np.float64):
        model, gradients = build_model(a, dtype)
        tokens, targets = draw(a, 3, 8)
        loss = run(model, gradients, tokens, targets)
        assert gradients.flat.dtype == dtype
        results[dtype] = loss, np.concatenate([view.reshape(-1).astype(np.float64) for view in gradients.values()])
    bound = 10 * a.layers * math.sqrt(a.mlp_width) * float(np.finfo(np.float32).eps)
    (loss32, g32), (loss64, g64) = results[np.float32], results[np.float64]
    within("loss", abs(loss32 - loss64) / loss64, bound)
    within("gradients", float(np.linalg.norm(g32 - g64) / np.linalg.norm(g64)), bound)


def test_two_runs_have_equal_bits(build_model):
    a = dataclasses.replace(variant("dropout"), vocabulary=300, width=48, mlp_width=192)
    model, first = build_model(a, np.float32)
    second = first.layout.views(np.full_like(first.flat, 7))
    tokens, targets = draw(a, 4, 9)
    losses = [run(model, g, tokens, targets, dropout=mask(a)) for g in (first, second)]
    assert losses[0] == losses[1]
    for group in first:
        np.testing.assert_array_equal(first[group], second[group])


@pytest.mark.parametrize("size", ["tiny", "mini"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_standard_sizes_at_their_own_start(size, positions, build_model, gradient_error, within):
    """A short batch; a directional derivative over all parameters together, from GPT-2's start."""
    a = Architecture(
        vocabulary=257, **SIZES[size], kv_heads=SIZES[size]["heads"], mlp_width=4 * SIZES[size]["width"],
        positions=positions, tied_head=positions == "learned",
    )  # fmt: skip
    model, gradients = build_model(a, spread=0.0)
    tokens, targets = draw(a, 2, 9)
    loss = run(model, gradients, tokens, targets)
    assert loss / np.count_nonzero(targets != IGNORE_INDEX) == pytest.approx(math.log(257), rel=0.03)
    f = loss_function(model, tokens, targets)
    within("all", gradient_error(f, model.parameters.flat, gradients.flat, directions=1), 1e-7)


def is_residual(name):
    return name.endswith((".projection.weight", ".mlp_down.weight"))


@pytest.mark.parametrize("tied", [True, False])
def test_start_has_gpt2s_deviations(tied):
    a = Architecture(vocabulary=500, layers=3, width=96, mlp_width=384, tied_head=tied)
    layout = Layout(parameter_specs(a), np.float32)
    parameters = layout.views(initial_values(layout, 3))
    residual = INITIAL_DEVIATION / math.sqrt(2 * a.layers)
    for name, value in parameters.items():
        if value.ndim == 1:
            np.testing.assert_array_equal(value, 1.0 if name.endswith("norm.weight") else 0.0)
            continue
        expected = residual if is_residual(name) else INITIAL_DEVIATION
        # the deviation of n normal numbers is itself uncertain by 1/√(2n), their mean by 1/√n
        assert abs(value.std() / expected - 1) <= 5 / math.sqrt(2 * value.size), name
        assert abs(value.mean() / expected) <= 5 / math.sqrt(value.size), name
    assert ("head" in parameters) is not tied


def test_start_is_a_function_of_seed_and_name():
    """The same numbers in either dtype; a deeper model changes no other parameter but the residual projections."""

    def start(seed, dtype=np.float32, layers=2):
        layout = Layout(parameter_specs(dataclasses.replace(BASE, layers=layers)), dtype)
        return layout.views(initial_values(layout, seed))

    first, again, other, double, deep = start(9), start(9), start(10), start(9, np.float64), start(9, layers=3)
    drawn = [name for name, value in first.items() if value.ndim > 1]
    assert len({first[name].reshape(-1)[:5].tobytes() for name in drawn}) == len(drawn)
    for name in drawn:
        np.testing.assert_array_equal(again[name], first[name])
        np.testing.assert_array_equal(double[name], first[name].astype(np.float64))
        assert not np.any(other[name] == first[name])
        if not is_residual(name):
            np.testing.assert_array_equal(deep[name], first[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["tied-learned", "dropout-rope-grouped-untied", "crystalline-all"])
def test_the_plan_is_what_is_allocated(name, training, backend):
    a = variant(name)
    asked = []

    def empty_bytes(size):
        asked.append(size)
        return np.empty(size, np.uint8)

    class Counting:
        def __getattr__(self, attribute):
            return empty_bytes if attribute == "empty_bytes" else getattr(backend, attribute)

    w = Activations(a, Counting(), 3, 7, np.float32, training=training)
    plan = plan_activations(a, 3, 7, np.float32, training=training)
    assert asked == [plan.bytes]
    assert w.bytes == plan.bytes
    end = max(offset + math.prod(shape) * dtype.itemsize for _, shape, dtype, offset in plan)
    assert plan.bytes - 128 < end <= plan.bytes
    assert all(offset % 128 == 0 for *_, offset in plan)


def test_without_training_the_memory_does_not_grow_with_the_layers():
    sizes = {
        (layers, training): plan_activations(
            dataclasses.replace(BASE, layers=layers), 3, 7, np.float32, training=training
        ).bytes
        for layers in (1, 9)
        for training in (True, False)
    }
    assert sizes[1, False] == sizes[9, False]
    assert sizes[9, True] > 5 * sizes[1, False]


def test_buffers_of_the_plan_do_not_overlap():
    plan = plan_activations(BASE, 3, 7, np.float32, training=True)
    memory = np.zeros(plan.bytes, np.uint8)
    views = plan.allocate(lambda size: memory[:size])
    for view in views.values():
        assert not view.any()
        view[...] = 1


def test_a_step_needs_little_besides_its_plan(build_model):
    """Nothing of T×T for all heads, and no temporary the size of an activation for every layer."""
    a = Architecture(vocabulary=64, context=384, layers=3, heads=8, kv_heads=8, width=32, mlp_width=128)
    model, gradients = build_model(a, np.float32, spread=0.0)
    tokens, targets = draw(a, 2, 384)
    w = Activations(a, model.backend, 2, 384, np.float32, training=True)
    arguments = {"gradient_scale": 1.0, "accumulate": False}
    model.loss_and_gradients(w, tokens, targets, gradients, **arguments)
    tracemalloc.start()
    try:
        model.loss_and_gradients(w, tokens, targets, gradients, **arguments)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tile = CPU_QUERY_BLOCK * 384 * 4
    print(f"peak of temporaries {peak / tile:.2f} tiles of attention weights, {peak / w.bytes:.3f} of the activations")
    assert peak <= 4.5 * tile  # the tiles of one head and a little; all heads of one sequence would be 24
    assert peak <= w.bytes / 4


def test_more_tokens_than_the_context_is_refused_by_learned_positions(build_model):
    model, _ = build_model(BASE)
    w = Activations(BASE, model.backend, 1, BASE.context + 1, np.float64, training=False)
    with pytest.raises(ValueError, match="broadcast"):
        model.logits(w, np.zeros((1, BASE.context + 1), np.int32))


# ---- crystalline attention


def test_an_untrained_crystalline_model_is_the_standard_one(backend):
    """Scalars start at 0 and the symmetry is off: equal logits, to the bit, in float32."""
    tokens, _ = draw(BASE, 2, 9)
    logits = []
    for lattice in (None, LatticeTerms(matches=8, distance=True, prime_distance=True, learned_points=True)):
        a = dataclasses.replace(BASE, lattice=lattice)
        layout = Layout(parameter_specs(a), np.float32)
        model = Transformer(a, backend, layout.views(initial_values(layout, 4)))
        logits.append(model.logits(Activations(a, backend, 2, 9, np.float32, training=False), tokens))
    np.testing.assert_array_equal(logits[0], logits[1])


def test_lattice_parameters_start_where_the_lattice_is_and_are_not_decayed():
    a = dataclasses.replace(BASE, lattice=dataclasses.replace(EVERY_TERM, start=0.25))
    layout = Layout(parameter_specs(a), np.float32)
    parameters = layout.views(initial_values(layout, 1))
    np.testing.assert_array_equal(parameters["lattice_points"], lattice_points(23).astype(np.float32))
    assert parameters["blocks.1.lattice_scalars"].shape == (3, 11)
    assert np.all(parameters["blocks.1.lattice_scalars"] == 0.25)
    names = list(layout.specs)
    assert names[-2:] == ["blocks.0.lattice_scalars", "blocks.1.lattice_scalars"]
    groups = parameter_groups(OptimizerConfig())
    ordinary, scalars = segments(layout, groups)
    assert layout.offsets["lattice_points"] >= ordinary.decayed
    assert ordinary.part.stop == scalars.part.start == layout.offsets["blocks.0.lattice_scalars"]
    standard = Layout(parameter_specs(BASE), np.float32)
    assert [segment.part for segment in segments(standard, groups)] == [slice(0, standard.size)]


def test_a_layer_sees_what_followed_the_context_earlier(build_model):
    """With one huge μ_2 and nothing else to go by, the last position attends where its two tokens were followed."""
    a = dataclasses.replace(BASE, context=12, lattice=LatticeTerms(matches=2, same_token=False))
    model, _ = build_model(a, spread=0.0)
    for layer in range(2):
        model.parameters[f"blocks.{layer}.lattice_scalars"][:, 1] = 100.0
    tokens = np.array([[7, 8, 9, 1, 2, 8, 4, 5, 9, 3, 7, 8]], np.int32)
    w = Activations(a, model.backend, 1, 12, np.float64, training=True)
    model.logits(w, tokens)
    weights = model.attention_weights(w, 0)
    np.testing.assert_allclose(weights[0, :, 11, 2], 1.0, atol=1e-12)  # the 9 after the earlier 7, 8
    assert model.attention_weights(w, 0, score_bias=False)[0, :, 11, 2].max() < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matches": 9}, "matches is 9; it must lie between 0 and 8"),
        ({"matches": -1}, "matches is -1"),
        ({"symmetry_fraction": 1.5}, "symmetry_fraction is 1.5; it must lie between 0 and 1"),
        ({"symmetry_fraction": math.nan}, "symmetry_fraction is nan"),
        ({"start": math.inf}, "start is inf; it must be a finite number"),
        ({"learned_points": True}, "learned_points needs a term that sees the points"),
    ],
)
def test_impossible_terms_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LatticeTerms(**changes)
