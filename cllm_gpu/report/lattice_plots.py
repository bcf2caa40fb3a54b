"""Plots of the lattice: the tokens' points, the scalars a model learned, and attention weights with and without terms.

All plots need matplotlib (the extra `plots`); the draw functions return a figure for `figure.save_figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.model.activations import Activations
from cllm_gpu.model.lattice import lattice_points, primes
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.symmetry import ELEMENTS, ROTATIONS
from cllm_gpu.report.figure import require_plots

Array = npt.NDArray[Any]
LABELLED = 300
"""Largest vocabulary whose points are labelled with the tokens."""
DRAWN = 20_000
"""Maximum number of points; a larger vocabulary is subsampled evenly."""
_CYCLE = "hsv"  # cyclic, as the twelve rotations are


def draw_lattice(vocabulary: int, names: Sequence[str] | None = None) -> Any:
    """The lattice of a vocabulary from above and in 3D, coloured by symmetry element. names: labels of the tokens."""
    figure = require_plots()(figsize=(15, 7), layout="constrained")
    tokens = np.unique(np.linspace(0, vocabulary - 1, min(vocabulary, DRAWN)).astype(int))
    points, elements = lattice_points(vocabulary)[tokens], tokens % ELEMENTS
    size = float(np.clip(6000 / len(tokens), 1.0, 60.0))
    above = figure.add_subplot(1, 2, 1, aspect="equal")
    space = figure.add_subplot(1, 2, 2, projection="3d")
    for reflected, marker, label in ((False, "o", "rotation"), (True, "^", "reflection")):
        own = (elements >= ROTATIONS) == reflected
        style = {
            "c": elements[own] % ROTATIONS, "cmap": _CYCLE, "vmin": 0, "vmax": ROTATIONS, "marker": marker, "s": size,
        }  # fmt: skip
        above.scatter(points[own, 0], points[own, 1], label=label, linewidths=0, **style)
        last = space.scatter(*points[own].T, depthshade=False, linewidths=0, **style)
    if names is not None and vocabulary <= LABELLED:
        for token, name in zip(tokens, names, strict=True):
            above.annotate(name, points[token, :2], fontsize=6, xytext=(3, 3), textcoords="offset points")
    largest = int(primes(vocabulary)[-1])
    above.set_title(f"from above: radius √((t + ½)/V), turned by the golden angle; {vocabulary:,} tokens")
    above.legend(loc="upper right", frameon=False)
    above.set_axis_off()
    space.set_title(f"in space: height ln p(t) / ln p(V − 1), primes from 2 to {largest:,}")
    space.set_zlabel("z")
    space.set_box_aspect((1, 1, 0.8), zoom=0.95)
    space.view_init(elev=18, azim=-60)
    bar = figure.colorbar(last, ax=space, shrink=0.6, ticks=np.arange(ROTATIONS) + 0.5, label="turn, in twelfths")
    bar.ax.set_yticklabels(map(str, range(ROTATIONS)))
    return figure


def learned_scalars(model: Transformer) -> tuple[Array, tuple[str, ...]]:
    """The lattice scalars (layers, heads, terms) on the host, and the names of the terms; both empty without terms."""
    a = model.architecture
    names = () if a.lattice is None else a.lattice.scalars
    if not names:
        return np.zeros((a.layers, a.heads, 0)), ()
    views = (model.parameters[f"blocks.{layer}.lattice_scalars"] for layer in range(a.layers))
    return np.stack([model.backend.to_host(view) for view in views]), names


def draw_scalars(scalars: Array, names: Sequence[str]) -> Any:
    """Scalars (layers, heads, terms) as a heat map: a row per head of each layer, a column per term.

    Red increases the attention. Distances enter the scores with a minus sign, so their scalars are shown negated.
    """
    layers, heads, terms = scalars.shape
    shown = scalars * np.array([-1.0 if "distance" in name else 1.0 for name in names])
    rows = shown.reshape(layers * heads, terms)
    figure = require_plots()(figsize=(3.5 + 0.8 * terms, 1.8 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    largest = float(np.abs(rows).max()) or 1.0
    image = axes.imshow(rows, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    signs = ["−" if "distance" in name else "" for name in names]
    axes.set_xticks(range(terms), [s + n.replace("_", " ") for s, n in zip(signs, names, strict=True)], rotation=30)
    axes.set_yticks(range(len(rows)), [f"layer {i // heads}, head {i % heads}" for i in range(len(rows))], fontsize=8)
    for (row, column), value in np.ndenumerate(rows):
        dark = abs(value) > 0.6 * largest
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="black", linewidth=0.8)
    axes.set_title("what the terms add to the scores")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def prompt_weights(model: Transformer, tokens: Array, layer: int) -> tuple[Array, Array]:
    """Attention weights (H, T, T) of a layer for tokens (T,), with and without the lattice terms, on the host."""
    backend = model.backend
    ids = backend.asarray(np.ascontiguousarray(tokens, dtype=np.int32)[None])
    dtype = model.parameters.layout.dtype
    w = Activations(model.architecture, backend, 1, ids.shape[1], dtype, training=True)
    model.logits(w, ids)
    with_terms, without = (model.attention_weights(w, layer, score_bias=score_bias) for score_bias in (True, False))
    return backend.to_host(with_terms)[0], backend.to_host(without)[0]


def draw_weights(with_terms: Array, without: Array, names: Sequence[str], title: str) -> Any:
    """Attention weights (T, T) of one head on a prompt: without the terms, with them, and the difference."""
    count = len(names)
    figure = require_plots()(figsize=(18, 6.6), layout="constrained")
    panels = figure.subplots(1, 3)
    largest = float(max(with_terms.max(), without.max()))
    change = with_terms - without
    furthest = float(np.abs(change).max()) or 1.0
    for axes, weights, label, style in (
        (panels[0], without, "without the terms", {"cmap": "Greys", "vmin": 0, "vmax": largest}),
        (panels[1], with_terms, "with the terms", {"cmap": "Greys", "vmin": 0, "vmax": largest}),
        (panels[2], change, "difference", {"cmap": "RdBu_r", "vmin": -furthest, "vmax": furthest}),
    ):
        image = axes.imshow(weights, interpolation="nearest", **style)
        axes.set_title(label)
        size = float(np.clip(400 / count, 3, 9))
        axes.set_xticks(range(count), names, fontsize=size, rotation=90 if max(map(len, names)) > 1 else 0)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        figure.colorbar(image, ax=axes, shrink=0.7)
    figure.suptitle(title)
    return figure
