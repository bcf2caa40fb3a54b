"""Attention score bias of the lattice: terms computed from the tokens at the query and key positions.

For query position i and key position j of a token sequence t with lattice points c = (x, y, z), per query head:

    −α·‖c(t_i) − c(t_j)‖                  distance
    −β·|z(t_i) − z(t_j)|                  prime distance, |ln p(t_i) − ln p(t_j)| / ln p(V − 1)
    +γ·[t_i = t_j]                        same token (two primes share a factor only if they are equal)
    +Σ_n μ_n·M_n(i, j), n = 1 … N         translation matches: M_n = 1 when the n tokens that end at i are the n tokens
                                          that end just before j (t_{i−m} = t_{j−1−m} for m < n, all in the sequence)

With ℓ(i, j) the length of the longest match, at most N: Σ_n μ_n·M_n = Σ_{n ≤ ℓ} μ_n, one table look-up per pair.
Gradients, with dS the gradient of the scores: dα = −Σ dS·‖…‖, dβ = −Σ dS·|Δz|, dγ = Σ dS·[same], dμ_n = Σ dS·[ℓ ≥ n],
over batch and positions; and the gradients of the points, where ‖…‖ and |…| have derivative 0 at 0 (equal points).
The bias is never stored for all pairs: each block of queries computes its own from the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAXIMUM_MATCHES = 8


@dataclass(frozen=True)
class ScoreBias:
    """The terms of a score bias and the arrays they are computed from."""

    tokens: Any
    """(B, S) int32: the token at every key position; the queries are at the last T of them."""
    points: Any
    """(B, S, 3): the lattice points of those tokens; None if neither distance is used."""
    scalars: Any
    """(H, n): one column per term in use, in the order α, β, γ, μ_1 … μ_N."""
    distance: bool
    prime_distance: bool
    same_token: bool
    matches: int
    """N, the longest match that counts, at most 8; 0 for no match terms."""

    @property
    def uses_tokens(self) -> bool:
        """Whether tokens are compared."""
        return self.same_token or self.matches > 0

    @property
    def uses_points(self) -> bool:
        """Whether a distance is in use."""
        return self.distance or self.prime_distance

    @property
    def count(self) -> int:
        """n, scalars per head."""
        return self.distance + self.prime_distance + self.same_token + self.matches


@dataclass(frozen=True)
class ScoreBiasGradients:
    """Arrays that the gradients of the scalars (H, n) and of the points (B, S, 3; None: not computed) are added to."""

    scalars: Any
    points: Any


class ScoreBiasBlock:
    """Score bias of one block of pairs: `queries` and `keys` are ranges of positions of batch item b."""

    def __init__(self, xp: Any, score_bias: ScoreBias, b: int, queries: slice, keys: slice, dtype: Any) -> None:
        self._xp, self._score_bias, self._b = xp, score_bias, b
        self._queries, self._keys = queries, keys
        tokens = score_bias.tokens[b]
        self._difference: Any = None
        if score_bias.points is not None:
            points = score_bias.points[b].astype(dtype, copy=False)
            self._difference = points[queries, None] - points[None, keys]  # (Q, K, 3)
        self._features: list[Any] = []  # (Q, K) each, with the sign of its term
        if score_bias.distance:
            self._features.append(-xp.sqrt((self._difference**2).sum(axis=-1)))
        if score_bias.prime_distance:
            self._features.append(-xp.abs(self._difference[..., 2]))
        if score_bias.same_token:
            self._features.append(tokens[queries, None] == tokens[None, keys])
        self._lengths = match_lengths(xp, tokens, queries, keys, score_bias.matches) if score_bias.matches else None

    def add_to(self, scores: Any, scalars: Any) -> None:
        """scores (…, Q, K) += the bias for scalars (…, n)."""
        xp = self._xp
        for column, feature in enumerate(self._features):
            scores += scalars[..., column, None, None] * feature
        if self._lengths is not None:
            steps = scalars[..., len(self._features) :]
            table = xp.concatenate([xp.zeros_like(steps[..., :1]), xp.cumsum(steps, axis=-1)], axis=-1)
            scores += table[..., self._lengths]

    def add_gradients(self, dscores: Any, scalars: Any, dscalars: Any, dpoints: Any | None) -> None:
        """dscalars (…, n) and dpoints (B, S, 3) += their gradients from dscores (…, Q, K)."""
        for column, feature in enumerate(self._features):
            dscalars[..., column] += (dscores * feature).sum(axis=(-2, -1))
        if self._lengths is not None:
            for n in range(1, self._score_bias.matches + 1):
                dscalars[..., len(self._features) + n - 1] += (dscores * (self._lengths >= n)).sum(axis=(-2, -1))
        if dpoints is not None:
            self._add_point_gradients(dscores, scalars, dpoints[self._b])

    def _add_point_gradients(self, dscores: Any, scalars: Any, dpoints: Any) -> None:
        xp, score_bias, difference = self._xp, self._score_bias, self._difference
        heads = tuple(range(dscores.ndim - 2))
        slopes = xp.zeros_like(difference)  # (Q, K, 3), gradient of the points' difference
        if score_bias.distance:
            length = -self._features[0]
            by_length = -(dscores * scalars[..., 0, None, None]).sum(axis=heads) / xp.where(length > 0, length, 1)
            slopes += by_length[..., None] * difference
        if score_bias.prime_distance:
            column = int(score_bias.distance)
            by_height = -(dscores * scalars[..., column, None, None]).sum(axis=heads)
            slopes[..., 2] += by_height * xp.sign(difference[..., 2])
        dpoints[self._queries] += slopes.sum(axis=1)
        dpoints[self._keys] -= slopes.sum(axis=0)


def match_lengths(xp: Any, tokens: Any, queries: slice, keys: slice, longest: int) -> Any:
    """Match lengths ℓ(i, j) ≤ `longest`, for positions i in `queries` and j in `keys` of tokens (S,): (Q, K) uint8."""
    count, columns = queries.stop - queries.start, keys.stop - keys.start
    lengths = xp.zeros((count, columns), dtype=xp.uint8)
    matching = xp.ones((count, columns), dtype=bool)
    for m in range(longest):
        of_queries = _earlier(xp, tokens, queries, m, -1)
        of_keys = _earlier(xp, tokens, keys, m + 1, -2)  # not -1: positions before the sequence never match
        matching &= of_queries[:, None] == of_keys[None, :]
        lengths += matching
    return lengths


def _earlier(xp: Any, tokens: Any, positions: slice, distance: int, outside: int) -> Any:
    """The tokens `distance` places before `positions`, `outside` before the first."""
    missing = min(max(distance - positions.start, 0), positions.stop - positions.start)
    found = tokens[max(positions.start - distance, 0) : max(positions.stop - distance, 0)]
    return xp.concatenate([xp.full(missing, outside, dtype=tokens.dtype), found])
