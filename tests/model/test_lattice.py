"""The lattice: primes against trial division, points against their formula, the symmetry group."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from cllm_gpu.model.lattice import GOLDEN_ANGLE, lattice_points, primes, symmetry_turns
from cllm_gpu.ops.reference.rotary import rotary_forward, rotary_tables
from cllm_gpu.ops.reference.symmetry import ELEMENTS, Symmetry, symmetry_backward, symmetry_forward, turned
from cllm_gpu.utils.errors import UserError


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 24, 257, 2000])
def test_primes_are_those_of_trial_division(count):
    found = primes(count)
    expected = list(itertools.islice((n for n in itertools.count(2) if is_prime(n)), count))
    assert found.tolist() == expected


def test_the_largest_vocabulary():
    """π(16,290,047) = 2^20: the last prime of V = 2^20 is prime, and there are as many below it as there must be."""
    found = primes(2**20)
    assert found.shape == (2**20,)
    assert np.all(np.diff(found) > 0)
    assert is_prime(int(found[-1]))
    # Legendre's count, independent of any sieve over the whole range
    assert prime_count(int(found[-1])) == 2**20


def prime_count(n):
    """π(n) by the Lucy_Hedgehog recurrence: S(v, p) = S(v, p − 1) − (S(v/p, p − 1) − S(p − 1, p − 1))."""
    root = math.isqrt(n)
    small = np.arange(-1, root, dtype=np.int64)  # small[v] = numbers 2 … v left, v ≤ √n
    large = np.array([0, *(n // i - 1 for i in range(1, root + 1))], dtype=np.int64)  # large[i]: those up to n // i
    for p in range(2, root + 1):
        if small[p] == small[p - 1]:
            continue
        below = small[p - 1]
        last = min(root, n // (p * p))
        i = np.arange(1, last + 1)
        inner = np.where(i * p <= root, large[np.minimum(i * p, root)], small[np.minimum(n // (i * p), root)])
        large[1 : last + 1] -= inner - below
        for v in range(root, p * p - 1, -1):
            small[v] -= small[v // p] - below
    return int(large[1])


def test_a_negative_count_is_refused():
    with pytest.raises(UserError, match="-1 primes"):
        primes(-1)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 257, 8192])
def test_points_are_the_formula(vocabulary):
    points = lattice_points(vocabulary)
    assert points.shape == (vocabulary, 3)
    last = math.log(int(primes(vocabulary)[-1]))
    turn = (3 - math.sqrt(5)) / 2  # 1/φ² as a share of a circle
    for t in {0, 1, vocabulary // 2, vocabulary - 1} & set(range(vocabulary)):
        x, y, z = points[t]
        assert math.hypot(x, y) ** 2 == pytest.approx(float(Fraction(2 * t + 1, 2 * vocabulary)), rel=1e-14)
        angle = 2 * math.pi * math.fmod(t * turn, 1.0)
        assert (x, y) == pytest.approx(
            (math.hypot(x, y) * math.cos(angle), math.hypot(x, y) * math.sin(angle)), abs=1e-11
        )
        assert z == pytest.approx(math.log(int(primes(t + 1)[-1])) / last, rel=1e-15)
    assert math.degrees(GOLDEN_ANGLE) == pytest.approx(137.50776405003785)


def test_no_two_tokens_share_a_point_even_in_float32():
    points = lattice_points(2**20).astype(np.float32)
    assert len(np.unique(points, axis=0)) == 2**20


# ---- the symmetry group


def matrices(pairs):
    """S(e) of every element on 2·pairs dimensions, (24, 2P, 2P)."""
    turns = symmetry_turns(pairs)
    basis = np.eye(2 * pairs)[None, :, None]  # the basis vectors as one sequence
    found = []
    for e in range(ELEMENTS):
        x = basis.copy()
        symmetry_forward(np, x, Symmetry(np.full((1, 2 * pairs), e), turns))
        found.append(x[0, :, 0].T)
    return np.array(found)


@pytest.mark.parametrize("pairs", [1, 2, 3, 11, 16])
def test_the_elements_form_a_group(pairs):
    """Closed under products, with inverses and the identity; orthogonal; all 24 different; not commutative."""
    s = matrices(pairs)
    identity = np.eye(2 * pairs)
    np.testing.assert_allclose(s[0], identity, atol=0)
    np.testing.assert_allclose(s @ s.swapaxes(1, 2), np.broadcast_to(identity, s.shape), atol=1e-15)
    products = np.einsum("aij,bjk->abik", s, s).reshape(-1, 1, 2 * pairs, 2 * pairs)
    nearest = np.abs(products - s[None]).max(axis=(2, 3))  # (576, 24)
    which = nearest.argmin(axis=1)
    assert nearest.min(axis=1).max() <= 1e-14
    table = which.reshape(ELEMENTS, ELEMENTS)
    for row in (*table, *table.T):
        assert sorted(row) == list(range(ELEMENTS))  # a Latin square: every element has an inverse
    assert np.any(table != table.T)
    distances = np.abs(s[:, None] - s[None]).max(axis=(2, 3))
    assert distances[~np.eye(ELEMENTS, dtype=bool)].min() > 0.1


def test_rotations_and_reflections_are_what_the_definition_says(generator):
    """First (x, y) → (x, −y) for e ≥ 12, then a turn by 2π·(e mod 12)/12 times m + 1, as complex numbers."""
    pairs = 5
    x = generator.standard_normal((1, ELEMENTS, 2, 2 * pairs + 3))
    y = x.copy()
    symmetry_forward(np, y, Symmetry(np.arange(ELEMENTS)[None], symmetry_turns(pairs)))
    for e, head, m in itertools.product(range(ELEMENTS), range(2), range(pairs)):
        z = complex(*x[0, e, head, 2 * m : 2 * m + 2])
        angle = 2 * math.pi * (e % 12) / 12 * (m + 1)
        expected = (z.conjugate() if e >= 12 else z) * complex(math.cos(angle), math.sin(angle))
        assert abs(complex(*y[0, e, head, 2 * m : 2 * m + 2]) - expected) <= 1e-14
    np.testing.assert_array_equal(y[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 7)])
def test_symmetry_backward_is_the_derivative(shape, generator, gradient_error, within):
    x, dout = generator.standard_normal((2, *shape))
    symmetry = Symmetry(generator.integers(1000, size=shape[:2]), symmetry_turns(shape[-1] // 2))
    dx = dout.copy()
    symmetry_backward(np, dx, symmetry)

    def f():
        y = x.copy()
        symmetry_forward(np, y, symmetry)
        return float(np.sum(y * dout))

    within("dx", gradient_error(f, x, dx), 1e-7)


def test_symmetry_backward_undoes_forward_on_strided_views(generator):
    fused = generator.standard_normal((2, 9, 5, 8))
    before = fused.copy()
    symmetry = Symmetry(generator.integers(1000, size=(2, 9)), symmetry_turns(3))
    symmetry_forward(np, fused[:, :, 1:3], symmetry)
    assert np.abs(fused[:, :, 1:3] - before[:, :, 1:3]).max() > 0.1
    np.testing.assert_array_equal(fused[:, :, [0, 3, 4]], before[:, :, [0, 3, 4]])
    symmetry_backward(np, fused[:, :, 1:3], symmetry)
    np.testing.assert_allclose(fused, before, atol=1e-14)


def test_elements_are_the_last_tokens_modulo_24():
    symmetry = Symmetry(np.array([[5, 0, 23, 24, 47, 2**20 - 1]], np.int32), symmetry_turns(1))
    assert symmetry.elements(5).tolist() == [[0, 23, 0, 23, (2**20 - 1) % 24]]
    assert symmetry.elements(5).dtype == np.int32
    assert symmetry.elements(0).shape == (1, 0)


def test_before_the_rotation_scores_depend_on_distances_only(generator):
    """(R S q)·(R S k) is the same when both positions move on; were S after R, it would not be."""
    pairs, size, length = 3, 10, 6
    symmetry = Symmetry(generator.integers(1000, size=(1, length)), symmetry_turns(pairs))
    q, k = generator.standard_normal((2, 1, length, 2, size))
    tables = rotary_tables(np, 40, size, np.float64)

    def scores(first, *, symmetry_first):
        cosine, sine = (table[first : first + length] for table in tables)
        rotated = []
        for x in (q, k):
            y = x.copy()
            rotary_forward(np, y, cosine, sine, symmetry=symmetry if symmetry_first else None)
            rotated.append(y if symmetry_first else turned(np, y, symmetry))
        return np.einsum("bihd,bjhd->bhij", *rotated)

    np.testing.assert_allclose(scores(0, symmetry_first=True), scores(29, symmetry_first=True), atol=1e-13)
    assert np.abs(scores(0, symmetry_first=False) - scores(29, symmetry_first=False)).max() > 0.1
