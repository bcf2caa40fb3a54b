"""Every reference operation on bfloat16 arrays: float32 inside, one rounding of exactly what it writes."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cllm_gpu.model.lattice import symmetry_turns
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.ops.reference.bfloat16 import in_bfloat16
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.ops.registry import OPERATIONS

NARROW = in_bfloat16(OPERATIONS.values())
ROUND_ONCE = sorted(name for name, found in OPERATIONS.items() if not found.flat and found.module != "mlp")
Rng = np.random.Generator
MASK = Dropout(0.25, seed=3, step=2, site=1)


def arguments(name: str, rng: Rng) -> dict[str, Any]:
    """A call of every parameter: narrow arrays bfloat16, statistics float32.

    What is not here is in the operation's own tests: `bfloat16_arguments(name, draw)`.
    """
    a, b, rows, columns, m = 2, 5, 10, 8, 6

    def draw(*shape: int, dtype: Any = BFLOAT16) -> Any:
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    x, vector = draw(rows, columns), draw(columns)
    tokens = rng.integers(0, 7, (a, b)).astype(np.int32)
    norm = {"weight": vector, "mean": draw(rows, dtype="f4"), "rstd": draw(rows, dtype="f4")}
    heads, sine = (
        draw(a, b, 3, columns),
        dict(zip(("cosine", "sine"), rotary_tables(np, b, columns, "f4"), strict=True)),
    )
    symmetry = {"symmetry": Symmetry(tokens, symmetry_turns(2).astype("f4"))}
    attention = {"q": draw(a, b, 2, columns), "k": draw(a, b, 1, columns), "v": draw(a, b, 1, columns)}
    attention |= {"causal": True, "scale": 0.3, "score_bias": _score_bias(rng, tokens)} | symmetry
    out, lse = draw(a, b, 2, columns), 1 + np.abs(draw(a, 2, b, dtype="f4"))
    calls: dict[str, dict[str, Any]] = {
        "embedding_forward": {"tokens": tokens, "token_embedding": draw(7, columns), "out": x,
                              "position_embedding": draw(b, columns), "dropout": MASK},
        "embedding_backward": {"dout": x, "tokens": tokens, "dtoken_embedding": draw(7, columns),
                               "dposition_embedding": draw(b, columns), "accumulate_tokens": True,
                               "accumulate_positions": True},
        "linear_forward": {"x": x, "weight": draw(m, columns), "bias": draw(m), "out": draw(rows, m)},
        "linear_backward": {"dout": draw(rows, m), "x": x, "weight": draw(m, columns), "dx": draw(rows, columns),
                            "dweight": draw(m, columns), "dbias": draw(m), "accumulate": True},
        "gelu_forward": {"x": x, "bias": vector, "out": draw(rows, columns)},
        "gelu_backward": {"dout": draw(rows, columns), "x": x, "dx": draw(rows, columns), "dbias": vector,
                          "accumulate": True},
        "layernorm_forward": norm | {"x": x, "bias": draw(columns), "out": draw(rows, columns), "epsilon": 1e-5},
        "residual_layernorm_forward": norm | {"residual": x, "branch": draw(rows, columns), "bias": draw(columns),
                                              "residual_out": draw(rows, columns), "out": draw(rows, columns),
                                              "epsilon": 1e-5, "dropout": MASK},
        "layernorm_backward": norm | {"dout": draw(rows, columns), "x": x, "dresidual": draw(rows, columns),
                                      "dx": draw(rows, columns), "dbranch": draw(rows, columns),
                                      "dweight": draw(columns), "dbias": draw(columns), "accumulate": True,
                                      "dropout": MASK},
        "rotary_forward": sine | symmetry | {"x": heads},
        "rotary_backward": sine | symmetry | {"dx": heads},
        "attention_forward": attention | {"out": out, "lse": lse},
        "attention_backward": attention | {"dout": draw(a, b, 2, columns), "out": out, "lse": lse,
                                           "dq": draw(a, b, 2, columns), "dk": draw(a, b, 1, columns),
                                           "dv": draw(a, b, 1, columns),
                                           "dscore_bias": ScoreBiasGradients(draw(2, 4), draw(a, b, 3, dtype="f4"))},
        "attention_weights": {key: value for key, value in attention.items() if key != "v"},
        "cross_entropy": {"logits": draw(rows, 7), "targets": tokens.reshape(-1), "losses": draw(rows, dtype="f4"),
                          "ignore_index": -1, "gradient_scale": 0.5},
    }  # fmt: skip
    if name in calls:
        return calls[name]
    own = importlib.import_module(f"tests.ops.reference.test_{OPERATIONS[name].module}")
    return own.bfloat16_arguments(name, draw)


def _score_bias(rng: Rng, tokens: Any) -> ScoreBias:
    points = rng.standard_normal((*tokens.shape, 3)).astype(np.float32)
    scalars = rng.standard_normal((2, 4)).astype(BFLOAT16)
    return ScoreBias(tokens, points, scalars, distance=True, prime_distance=True, same_token=True, matches=1)


def arrays(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every array with its parameter's name, those within score terms too."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            yield from ((name, x) for x in fields.values() if isinstance(x, np.ndarray))
        elif isinstance(value, np.ndarray):
            yield name, value


def widened(value: Any) -> Any:
    """Copies, float32 for bfloat16."""
    if isinstance(value, ScoreBias | ScoreBiasGradients):
        fields = {f.name: widened(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == BFLOAT16 else value.copy()
    return value


@pytest.mark.parametrize("name", ROUND_ONCE)
def test_float32_inside_and_one_rounding(name: str, generator: Rng) -> None:
    reference = OPERATIONS[name].reference
    given = arguments(name, generator)
    assert set(given) | {"first_position", "order"} >= set(inspect.signature(reference).parameters) - {"xp"}
    wide, before = ({key: widened(value) for key, value in given.items()} for _ in range(2))
    want, got = reference(np, **wide), NARROW[name](np, **given)
    assert (got is None) == (want is None)
    assert want is None or np.array_equal(got, want)
    changed = set()
    for (key, narrow), (_, exact), (_, start) in zip(arrays(given), arrays(wide), arrays(before), strict=True):
        np.testing.assert_array_equal(narrow, exact.astype(narrow.dtype), err_msg=key, strict=True)
        if not np.array_equal(exact, start):
            changed.add(key)
    assert changed == set(OPERATIONS[name].writes)


def test_every_operation_is_there_and_the_flat_ones_are_left_as_they_are() -> None:
    assert set(NARROW) == set(OPERATIONS)
    as_they_are = {name for name, function in NARROW.items() if function is OPERATIONS[name].reference}
    assert as_they_are == {name for name, found in OPERATIONS.items() if found.flat}
    assert as_they_are >= {"squared_norm", "adam_step", "sgd_step"}


def test_the_mlp_rounds_between_its_parts(generator: Rng) -> None:
    """Each of its parts is the narrow operation: what the backward is given is what the forward went on with."""
    n, c, m = 5, 8, 6
    x, dout, up, down = (generator.standard_normal(s).astype(BFLOAT16) for s in ((n, c), (n, c), (m, c), (c, m)))
    hidden, activated, dhidden, out, dx, again = (np.zeros((n, k), BFLOAT16) for k in (m, m, m, c, c, c))
    NARROW["mlp_forward"](np, x, up, None, down, None, hidden, activated, out)
    NARROW["linear_forward"](np, activated, down, None, again)
    assert np.array_equal(out, again)
    gradients = [np.zeros_like(up), None, np.zeros_like(down), None]
    NARROW["mlp_backward"](np, dout, x, hidden, activated, up, down, dhidden, dx, *gradients, accumulate=False)
    want_dx, want = np.zeros_like(dx), np.zeros_like(up)
    NARROW["linear_backward"](np, dhidden, x, up, want_dx, want, None, accumulate=False)
    assert np.array_equal(dx, want_dx)
    assert np.array_equal(gradients[0], want)


def test_an_array_that_is_there_twice_has_one_copy(generator: Rng) -> None:
    """layernorm_backward adds to the residual stream's gradient in place; its input and output are one array."""
    given = arguments("layernorm_backward", generator)
    apart = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in given.items()}
    NARROW["layernorm_backward"](np, **apart)
    NARROW["layernorm_backward"](np, **given | {"dx": given["dresidual"].reshape(10, 8)})
    assert np.array_equal(given["dresidual"], apart["dx"])


def test_sums_are_not_in_eight_bits() -> None:
    """A bfloat16 sum of ones stops at 256."""
    ones, total = np.ones((3000, 1), BFLOAT16), np.zeros((1, 1), BFLOAT16)
    NARROW["linear_backward"](np, ones, ones, np.ones((1, 1), BFLOAT16), None, total, None, accumulate=False)
    assert total[0, 0] == np.array(3000, BFLOAT16)
