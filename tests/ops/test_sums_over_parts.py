"""Sums over parts in bfloat16: chunks of logits and micro-batches round a gradient once, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.devices.logit_chunks import ON_CARD, ON_HOST, LogitChunks
from cllm_gpu.model.activations import Activations, plan_activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters, Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.training.data_parallel import gradient_layout
from cllm_gpu.utils.compiler import find_compiler

BATCH, LENGTH = 4, 16
TIED = Architecture(vocabulary=23, context=LENGTH, layers=1, heads=2, kv_heads=2, width=16, mlp_width=32)
MODELS = {"tied": TIED, "untied": dataclasses.replace(TIED, tied_head=False)}
HALF_ULP = 2.0**-8
"""The most that rounding to bfloat16 moves a number, relative to it."""


def _rows(rows: int) -> LogitChunks:
    return LogitChunks(1 << 30, rows)


def _backend(name: str, precision: Any = "bf16") -> Backend:
    if name == "simulator" and find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    return get_backend(name, workers=1, precision=precision)


class Seen:
    """The float64 gradient of the head's (and a tied embedding's) own products, and what rounding each would give."""

    def __init__(self, backend: Backend, shape: tuple[int, int], start: Any) -> None:
        self.backend, self.shape = backend, shape
        self.exact = start.astype(np.float64)
        self.often = start.copy()
        self.chunks = 0

    def watched(self, *, tied: bool) -> Backend:
        ops = self.backend.ops

        def linear_backward(dout: Any, x: Any, *rest: Any, **options: Any) -> None:
            if dout.shape[1] == self.shape[0]:
                self.chunks += 1
                self._add(dout.astype(np.float64).T @ x.astype(np.float64))
            ops.linear_backward(dout, x, *rest, **options)

        def embedding_backward(dout: Any, tokens: Any, *rest: Any, **options: Any) -> None:
            if tied:
                part = np.zeros(self.shape)
                np.add.at(part, tokens.reshape(-1), dout.astype(np.float64))
                self._add(part)
            ops.embedding_backward(dout, tokens, *rest, **options)

        changed = ops.replace(linear_backward=linear_backward, embedding_backward=embedding_backward)
        return dataclasses.replace(self.backend, ops=changed)

    def _add(self, part: Any) -> None:
        self.exact = self.exact + part
        self.often = (self.often.astype(np.float64) + part).astype(np.float32).astype(self.often.dtype)


def _gradients(
    backend: Backend, architecture: Architecture, chunks: LogitChunks, *, start: float = 0.0
) -> tuple[Seen, FlatParameters, Activations]:
    """One forward and backward over random tokens, added to gradients of the deviation `start` unless that is 0."""
    rng = np.random.default_rng(7)
    layout = Layout(parameter_specs(architecture), backend.dtype)
    weights, gradients = (layout.views(backend.zeros(layout.size, backend.dtype)) for _ in range(2))
    weights.flat[...] = initial_values(layout, 3) * np.asarray(5, backend.dtype)
    gradients.flat[...] = (start * rng.standard_normal(layout.size)).astype(backend.dtype)
    name = "token_embedding" if architecture.tied_head else "head"
    seen = Seen(backend, gradients[name].shape, gradients[name])
    backend = dataclasses.replace(seen.watched(tied=architecture.tied_head), logit_chunks=chunks)
    w = Activations(architecture, backend, BATCH, LENGTH, backend.dtype, training=True)
    draws = (rng.zipf(1.4, (2, BATCH, LENGTH)) % architecture.vocabulary).astype(np.int32)
    Transformer(architecture, backend, weights).loss_and_gradients(
        w, *draws, gradients, gradient_scale=1.0 / (BATCH * LENGTH), accumulate=start != 0.0
    )
    return seen, gradients, w


def _error(got: Any, exact: Any) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("start", [0.0, 0.01], ids=["first", "added"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["numpy", "simulator"])
def test_the_heads_gradient_is_rounded_once(name: str, kind: str, start: float, within: Callable[..., None]) -> None:
    """Beside float64 sums of the very factors; `often` is what it was when every chunk was rounded."""
    architecture = MODELS[kind]
    parameter, errors = "token_embedding" if architecture.tied_head else "head", []
    for rows in (32, 8, 1):
        seen, gradients, w = _gradients(_backend(name), architecture, _rows(rows), start=start)
        assert seen.chunks == BATCH * LENGTH // rows
        assert w["head"].logits.shape[0] == rows
        assert w["head"].dhead.dtype == np.float32
        error, often = _error(gradients[parameter], seen.exact), _error(seen.often, seen.exact)
        print(f"{seen.chunks} chunks: {error:.2e} of the gradient, {often:.2e} with each chunk rounded")
        errors.append(error)
        elementwise = np.abs(gradients[parameter].astype(np.float64) - seen.exact) - HALF_ULP * np.abs(seen.exact)
        within("beyond half an ulp", float(elementwise.max()), 64 * 2.0**-23 * float(np.abs(seen.exact).max()))
    within("growth of the error from 2 chunks to 64", errors[-1] / errors[0] - 1.0, 0.02)  # other sums in float32
    if not often > 2.5 * error:
        pytest.fail(f"rounding each of {seen.chunks} chunks gives {often:.2e}: the test proves nothing")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("precision", "rows"), [("bf16", 64), ("fp32", 5)])
def test_nothing_is_summed_apart_where_nothing_is_rounded(kind: str, precision: Any, rows: int) -> None:
    """One chunk, or float32: each product goes into the gradient itself, as it always did."""
    seen, gradients, w = _gradients(_backend("numpy", precision), MODELS[kind], _rows(rows))
    assert w["head"].dhead is None
    assert seen.chunks == -(-BATCH * LENGTH // rows)
    parameter = "token_embedding" if MODELS[kind].tied_head else "head"
    roundings = (2.0 if precision == "bf16" else 64 * 2.0**-16) * HALF_ULP  # the chunk's and the embedding's
    assert _error(gradients[parameter], seen.exact) <= roundings


@pytest.mark.parametrize("training", [True, False])
def test_the_plan_has_the_sum_where_it_is_needed(training: bool) -> None:
    def names(dtype: Any, rows: int) -> dict[str, Any]:
        plan = plan_activations(TIED, BATCH, LENGTH, dtype, training=training, logit_chunks=_rows(rows))
        return {name: (shape, kind) for name, shape, kind, _ in plan}

    assert ("head.dhead" in names(BFLOAT16, 63)) is training
    assert names(BFLOAT16, 63).get("head.dhead", ((23, 16), np.float32)) == ((23, 16), np.float32)
    assert "head.dhead" not in names(BFLOAT16, 64 if training else 512)  # one chunk
    assert "head.dhead" not in names(np.float32, 63)


def test_rows_of_a_chunk() -> None:
    vocabulary, rows = 50304, 65536
    assert ON_HOST.at_once(rows, vocabulary, np.float32, training=True) == (64 << 20) // (4 * vocabulary) == 333
    assert ON_HOST.at_once(rows, vocabulary, np.float32, training=False) == 333
    assert ON_HOST.at_once(7, 256, np.float32, training=True) == 7
    assert ON_CARD.at_once(rows, vocabulary, BFLOAT16, training=True) == 8192
    assert ON_CARD.at_once(rows, vocabulary, BFLOAT16, training=False) == 1024
    assert ON_CARD.at_once(4096, vocabulary, np.float32, training=True) == 4096
    assert ON_CARD.at_once(rows, 1 << 20, BFLOAT16, training=True) == 1024  # 2 GiB
    assert LogitChunks(10).at_once(rows, vocabulary, np.float32, training=True) == 1
    assert LogitChunks(1 << 30, 2).at_once(rows, 8, np.float32, training=False) == 1


@pytest.mark.parametrize("parts", [2, 8, 32])
@pytest.mark.parametrize("name", ["numpy", "simulator"])
def test_micro_batches_add_up_in_float32(name: str, parts: int, within: Callable[..., None]) -> None:
    """Beside the float64 sum of what each gives by itself: 2^-23 a sum in float32, and what bfloat16 gave."""
    backend, batch, rng = _backend(name), 32, np.random.default_rng(2)
    layout = Layout(parameter_specs(TIED), backend.dtype)
    summed = gradient_layout(layout, backend, batch, batch // parts)
    assert summed.dtype == np.float32
    assert gradient_layout(layout, backend, batch, batch) is layout
    weights = layout.views(backend.zeros(layout.size, backend.dtype))
    weights.flat[...] = initial_values(layout, 3) * np.asarray(5, backend.dtype)
    model = Transformer(TIED, backend, weights)
    w = Activations(TIED, backend, batch // parts, LENGTH, backend.dtype, training=True, gradient_dtype=summed.dtype)
    wide, narrow, one = (x.views(backend.zeros(x.size, x.dtype)) for x in (summed, layout, summed))
    exact = np.zeros(layout.size)
    tokens, targets = (rng.zipf(1.4, (2, batch, LENGTH)) % TIED.vocabulary).astype(np.int32)
    for first in range(0, batch, batch // parts):
        rows = slice(first, first + batch // parts)
        for gradients in (one, wide, narrow):
            model.loss_and_gradients(
                w, tokens[rows], targets[rows], gradients,
                gradient_scale=1.0 / tokens.size, accumulate=first > 0 and gradients is not one,
            )  # fmt: skip
        exact += one.flat
    error, often = _error(wide.flat, exact), _error(narrow.flat, exact)
    print(f"{parts} micro-batches: {error:.2e} of the gradient, {often:.2e} in bfloat16")
    within(f"{parts} micro-batches", error, parts * 2.0**-23)
    if not often > HALF_ULP / 4:
        pytest.fail(f"adding {parts} in bfloat16 gives {often:.2e}: the test proves nothing")
