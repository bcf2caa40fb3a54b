"""Pictures of the lattice: what is drawn is what the model has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.lattice import lattice_points
from cllm_gpu.report.figure import save_figure
from cllm_gpu.report.lattice_plots import (
    DRAWN,
    draw_lattice,
    draw_scalars,
    draw_weights,
    learned_scalars,
    prompt_weights,
)

pytest.importorskip("matplotlib")
SHAPE = Architecture(vocabulary=30, context=12, layers=2, heads=2, kv_heads=2, width=12, mlp_width=16)
CRYSTALLINE = dataclasses.replace(SHAPE, lattice=LatticeTerms(matches=2, distance=True))


def drawn_points(figure):
    above = figure.axes[0]
    return np.concatenate([np.asarray(c.get_offsets()) for c in above.collections])


def test_every_token_is_drawn_where_the_lattice_has_it(tmp_path):
    figure = draw_lattice(257, [chr(t) if 32 < t < 127 else "" for t in range(257)])
    points, expected = drawn_points(figure), lattice_points(257)[:, :2]
    assert len(points) == 257
    np.testing.assert_allclose(points[np.lexsort(points.T)], expected[np.lexsort(expected.T)])
    assert len(figure.axes[0].texts) == 257
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


def test_large_vocabularies_are_thinned_out():
    assert len(drawn_points(draw_lattice(100_000))) == DRAWN


def test_scalars_are_those_of_the_parameters(build_model):
    model, _ = build_model(CRYSTALLINE)
    scalars, names = learned_scalars(model)
    assert names == ("distance", "same_token", "match_1", "match_2")
    np.testing.assert_array_equal(scalars[1], model.parameters["blocks.1.lattice_scalars"])
    axes = draw_scalars(scalars, names).axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown[:, 0], -scalars[..., 0].reshape(-1))  # a distance drives apart
    np.testing.assert_array_equal(shown[:, 1:], scalars[..., 1:].reshape(4, 3))
    assert [label.get_text() for label in axes.get_yticklabels()][2] == "layer 1, head 0"
    assert learned_scalars(build_model(SHAPE)[0])[0].shape == (2, 2, 0)


def test_weights_of_a_prompt(build_model):
    model, _ = build_model(CRYSTALLINE)
    tokens = np.array([3, 4, 5, 3, 4, 5, 3])
    with_terms, without = prompt_weights(model, tokens, 1)
    for weights in (with_terms, without):
        assert weights.shape == (2, 7, 7)
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-12)
    assert np.abs(with_terms - without).max() > 0.01
    figure = draw_weights(with_terms[0], without[0], [str(t) for t in tokens], "title")
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), with_terms[0] - without[0])
