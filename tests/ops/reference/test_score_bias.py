"""Score terms: matches by brute force, attention with terms by the book, every gradient by finite differences."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from cllm_gpu.model.lattice import lattice_points, primes
from cllm_gpu.ops.reference import attention
from cllm_gpu.ops.reference.attention import attention_backward, attention_forward, attention_weights
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients, match_lengths

ALL = {"distance": True, "prime_distance": True, "same_token": True, "matches": 4}
USES = {
    "all": ALL,
    "matches": {"matches": 8},
    "same": {"same_token": True},
    "distance": {"distance": True},
    "prime": {"prime_distance": True},
    "prime-matches": {"prime_distance": True, "matches": 1},
    "distance-same": {"distance": True, "same_token": True},
}
SIZES = {  # B, T, S, H, K, V
    "one": (1, 1, 1, 1, 1, 5),
    "usual": (2, 9, 9, 4, 2, 3),
    "cache": (2, 3, 11, 2, 1, 2),
    "blocks": (1, 133, 133, 2, 2, 4),  # two blocks of queries
    "repetitive": (1, 12, 12, 2, 2, 2),
    "large": (1, 6, 6, 1, 1, 2**20),
}


def brute_force(tokens, i, j, longest):
    """ℓ(i, j) by comparing windows: the largest n for which both lie in the sequence and are equal."""
    best = 0
    for n in range(1, longest + 1):
        if i - n + 1 >= 0 and j - n >= 0 and list(tokens[i - n + 1 : i + 1]) == list(tokens[j - n : j]):
            best = n
        else:
            break
    return best


@pytest.mark.parametrize("longest", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["random", "two tokens", "constant", "periodic", "none repeated"])
def test_matches_are_those_of_a_brute_force_search(kind, longest, generator):
    length = 40
    tokens = {
        "random": generator.integers(0, 6, length),
        "two tokens": generator.integers(0, 2, length),
        "constant": np.zeros(length, int),
        "periodic": np.arange(length) % 5,
        "none repeated": np.arange(length),
    }[kind].astype(np.int32)
    for queries, keys in (
        (slice(0, length), slice(0, length)),
        (slice(7, 23), slice(0, 23)),
        (slice(39, 40), slice(3, 40)),
    ):
        got = match_lengths(np, tokens, queries, keys, longest)
        expected = [
            [brute_force(tokens, i, j, longest) for j in range(keys.start, keys.stop)]
            for i in range(queries.start, queries.stop)
        ]
        np.testing.assert_array_equal(got, expected)


class Problem:
    """Operands of one call and its terms, float64."""

    def __init__(self, generator, use, size):
        b, t, s, h, kv, vocabulary = SIZES[size]
        d = 3
        self.q = generator.standard_normal((b, t, h, d))
        self.k, self.v = generator.standard_normal((2, b, s, kv, d))
        self.dout = generator.standard_normal(self.q.shape)
        self.tokens = generator.integers(vocabulary, size=(b, s)).astype(np.int32)
        options = {"distance": False, "prime_distance": False, "same_token": False, "matches": 0} | USES[use]
        sees = options["distance"] or options["prime_distance"]
        self.points = lattice_points(vocabulary)[self.tokens] if sees else None
        count = sum(map(int, options.values()))
        self.scalars = generator.standard_normal((h, count))
        self.score_bias = ScoreBias(self.tokens, self.points, self.scalars, **options)
        self.vocabulary = vocabulary

    def forward(self, score_bias=None):
        b, t, h, _ = self.q.shape
        out, lse = np.full(self.q.shape, np.nan), np.full((b, h, t), np.nan)
        attention_forward(
            np, self.q, self.k, self.v, out, lse, causal=True, scale=0.6, score_bias=score_bias or self.score_bias
        )
        return out, lse

    def backward(self):
        out, lse = self.forward()
        gradients = [np.full_like(x, np.nan) for x in (self.q, self.k, self.v)]
        dscore_bias = ScoreBiasGradients(
            np.zeros_like(self.scalars), None if self.points is None else np.zeros_like(self.points)
        )
        attention_backward(
            np, self.dout, self.q, self.k, self.v, out, lse, *gradients,
            causal=True, scale=0.6, score_bias=self.score_bias, dscore_bias=dscore_bias,
        )  # fmt: skip
        return gradients, dscore_bias

    def by_the_book(self):
        """A pair at a time, from the definitions."""
        b, t, h, _ = self.q.shape
        s, kv = self.k.shape[1:3]
        p = np.log(primes(self.vocabulary).astype(float))
        out = np.zeros_like(self.q)
        for item, head, i in itertools.product(range(b), range(h), range(t)):
            at, tokens = s - t + i, self.tokens[item]
            scores = []
            for j in range(at + 1):
                x = 0.6 * self.q[item, i, head] @ self.k[item, j, head // (h // kv)]
                scalars = iter(self.scalars[head])
                if self.score_bias.distance:
                    x -= next(scalars) * math.dist(self.points[item, at], self.points[item, j])
                if self.score_bias.prime_distance:
                    x -= next(scalars) * abs(p[tokens[at]] - p[tokens[j]]) / p[-1]
                if self.score_bias.same_token:
                    factor = math.gcd(*(int(primes(int(tokens[n]) + 1)[-1]) for n in (at, j)))
                    x += next(scalars) * (factor > 1)
                longest = brute_force(tokens, at, j, self.score_bias.matches)
                x += sum(list(scalars)[:longest])
                scores.append(x)
            weights = np.exp(scores)
            out[item, i, head] = weights @ self.v[item, : at + 1, head // (h // kv)] / weights.sum()
        return out


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("size", ["one", "usual", "cache", "repetitive"])
def test_forward_is_the_definition(use, size, generator):
    problem = Problem(generator, use, size)
    np.testing.assert_allclose(problem.forward()[0], problem.by_the_book(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("size", SIZES)
def test_backward_is_the_derivative(use, size, generator, gradient_error, within):
    problem = Problem(generator, use, size)
    gradients, dscore_bias = problem.backward()

    def f():
        return float(np.sum(problem.forward()[0] * problem.dout))

    operands = {"q": problem.q, "k": problem.k, "v": problem.v, "scalars": problem.scalars}
    for (name, x), dx in zip(operands.items(), (*gradients, dscore_bias.scalars), strict=True):
        within(f"d{name}", gradient_error(f, x, dx), 1e-7)


@pytest.mark.parametrize("use", ["all", "distance", "prime-matches"])
@pytest.mark.parametrize("size", ["usual", "cache", "blocks"])
def test_gradients_of_learned_points(use, size, generator, gradient_error, within):
    """Through a table by token, as the model has it: equal tokens move together and their distance stays 0."""
    problem = Problem(generator, use, size)
    table = lattice_points(problem.vocabulary) + 0.1 * generator.standard_normal((problem.vocabulary, 3))
    problem.points[...] = table[problem.tokens]
    _, dscore_bias = problem.backward()
    dtable = np.zeros_like(table)
    np.add.at(dtable, problem.tokens, dscore_bias.points)

    def f():
        problem.points[...] = table[problem.tokens]
        return float(np.sum(problem.forward()[0] * problem.dout))

    within("dpoints", gradient_error(f, table, dtable), 1e-7)


@pytest.mark.parametrize("use", USES)
def test_gradients_are_added_to_what_is_there(use, generator):
    problem = Problem(generator, use, "usual")
    _, once = problem.backward()
    out, lse = problem.forward()
    start = ScoreBiasGradients(
        np.full_like(problem.scalars, 3.0), None if problem.points is None else np.full_like(problem.points, 5.0)
    )
    scratch = [np.empty_like(x) for x in (problem.q, problem.k, problem.v)]
    attention_backward(
        np, problem.dout, problem.q, problem.k, problem.v, out, lse, *scratch,
        causal=True, scale=0.6, score_bias=problem.score_bias, dscore_bias=start,
    )  # fmt: skip
    np.testing.assert_allclose(start.scalars, once.scalars + 3.0, atol=1e-13)
    if problem.points is not None:
        np.testing.assert_allclose(start.points, once.points + 5.0, atol=1e-13)


@pytest.mark.parametrize("use", USES)
def test_scalars_of_zero_are_standard_attention_exactly(use, generator):
    problem = Problem(generator, use, "usual")
    problem.scalars[...] = 0.0
    out, lse = (np.empty_like(x) for x in problem.forward())
    attention_forward(np, problem.q, problem.k, problem.v, out, lse, causal=True, scale=0.6)
    for got, expected in zip(problem.forward(), (out, lse), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_weights_are_those_of_the_forward(generator):
    problem = Problem(generator, "all", "usual")
    weights = attention_weights(np, problem.q, problem.k, causal=True, scale=0.6, score_bias=problem.score_bias)
    spread = np.repeat(problem.v, 2, axis=2)
    np.testing.assert_allclose(np.einsum("bhts,bshd->bthd", weights, spread), problem.forward()[0], atol=1e-13)


@pytest.mark.parametrize("use", ["all", "matches"])
def test_nothing_is_held_for_all_pairs(use):
    """T×T is eight tiles of 128 queries here: with terms the peak stays at a few tiles (three of them for points)."""
    generator = np.random.default_rng(1)
    options = {"distance": False, "prime_distance": False, "same_token": False, "matches": 0} | USES[use]
    length, heads = 1024, 2
    tokens = generator.integers(0, 50, (1, length)).astype(np.int32)
    points = lattice_points(50)[tokens].astype(np.float32) if options["distance"] else None
    scalars = generator.standard_normal((heads, sum(map(int, options.values())))).astype(np.float32)
    score_bias = ScoreBias(tokens, points, scalars, **options)
    q, k, v = (generator.standard_normal((1, length, heads, 4)).astype(np.float32) for _ in range(3))
    out, lse = np.empty_like(q), np.empty((1, heads, length), np.float32)
    tile = attention.CPU_QUERY_BLOCK * length * 4
    tracemalloc.start()
    try:
        attention_forward(np, q, k, v, out, lse, causal=True, scale=0.5, score_bias=score_bias)
        _, forward_peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"tiles of {tile} bytes at the peak: {forward_peak / tile:.2f}")
    assert forward_peak <= (16 if use == "all" else 6) * tile
