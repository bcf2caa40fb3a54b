"""Batches: pure in (seed, step, rank), every window once per epoch, ranks apart; evaluation: every token once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data import IGNORE_INDEX, Batches, TokenSource, evaluation_batches, evaluation_windows
from cllm_gpu.data.random import permute
from cllm_gpu.utils.errors import UserError


def counting(length: int, *, pieces: int = 1) -> TokenSource:
    """A stream 0, 1, 2, …, over `pieces` arrays, so that a token says where it stood."""
    return TokenSource("counting", np.array_split(np.arange(length, dtype=np.uint32), pieces), vocabulary=length)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_one(size: int, key: int) -> None:
    image = permute(np.arange(size, dtype=np.uint64), size, key)
    assert np.array_equal(np.sort(image), np.arange(size, dtype=np.uint64))


def test_permutation_of_billions_is_quick_and_scattered() -> None:
    size = 10**12 + 39
    image = permute(np.arange(10000, dtype=np.uint64), size, 5)
    assert len(np.unique(image)) == 10000
    assert image.max() < size
    # the mean of n uniform draws lies within 5 standard errors, 5 / sqrt(12 n), of one half
    assert abs(float(image.mean()) / size - 0.5) < 5 / np.sqrt(12 * 10000)


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = Batches(counting(1000, pieces=7), batch=6, context=13, seed=3).batch(5)
    assert tokens.shape == targets.shape == (6, 13)
    assert tokens.dtype == targets.dtype == np.int32
    assert np.array_equal(targets, (tokens + 1) % 1000)
    assert np.array_equal(tokens[:, 1:], targets[:, :-1])


def test_pure_in_seed_step_and_rank() -> None:
    settings_ = {"batch": 4, "context": 16, "ranks": 2}
    one = Batches(counting(5000), seed=9, rank=1, **settings_)
    other = Batches(counting(5000, pieces=3), seed=9, rank=1, **settings_)
    later = [other.batch(step) for step in (900, 7, 0, 31, 7)]
    for step, batch in zip((900, 7, 0, 31, 7), later, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.batch(step), batch, strict=True))
    assert not np.array_equal(one.batch(0)[0], Batches(counting(5000), seed=10, rank=1, **settings_).batch(0)[0])
    assert not np.array_equal(one.batch(0)[0], Batches(counting(5000), seed=9, rank=0, **settings_).batch(0)[0])
    assert not np.array_equal(one.batch(0)[0], one.batch(1)[0])


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 400),
    context=st.integers(1, 40),
    batch=st.integers(1, 5),
    ranks=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_an_epoch_covers_every_window_once(length: int, context: int, batch: int, ranks: int, seed: int) -> None:
    if length < context + 1:
        length = context + 1
    source = counting(length)
    every = [Batches(source, batch=batch, context=context, seed=seed, rank=r, ranks=ranks) for r in range(ranks)]
    windows = every[0].windows_per_epoch
    steps = -(-3 * windows // (batch * ranks))
    starts = np.concatenate([b.starts(step) for step in range(steps) for b in every])
    for epoch in range(3):
        mine = starts[epoch * windows : (epoch + 1) * windows]
        covered = (mine[:, None] + np.arange(context)) % length
        assert len(np.unique(covered)) == windows * context  # no token twice, so no window twice
        assert length - windows * context < context  # and too few left out for another window


def test_ranks_see_together_what_one_rank_sees() -> None:
    source = counting(4000)
    alone = Batches(source, batch=12, context=10, seed=4)
    apart = [Batches(source, batch=3, context=10, seed=4, rank=rank, ranks=4) for rank in range(4)]
    for step in (0, 1, 40):
        together = np.concatenate([b.batch(step)[0] for b in apart])
        assert np.array_equal(together, alone.batch(step)[0])
        assert len(np.unique(together[:, 0])) == 12


def test_micro_batches_are_the_rows_of_the_large_batch() -> None:
    source = counting(4000)
    large, small = (Batches(source, batch=b, context=10, seed=4) for b in (12, 3))
    together = np.concatenate([small.batch(5 * 4 + micro)[0] for micro in range(4)])
    assert np.array_equal(together, large.batch(5)[0])


def test_epochs_differ_in_order_and_offset() -> None:
    batches = Batches(counting(1003), batch=10, context=10, seed=4)
    first = np.concatenate([batches.starts(step) for step in range(10)])
    second = np.concatenate([batches.starts(step) for step in range(10, 20)])
    # steps from window to window, over the end of the stream too, do not depend on the offset
    assert not np.array_equal(np.diff(first) % 1003, np.diff(second) % 1003)
    assert set((first % 10).tolist()) != set((second % 10).tolist())


def test_steps_far_away_are_as_cheap() -> None:
    batches = Batches(counting(1000), batch=2, context=10, seed=4)
    assert batches.batch(10**12)[0].shape == (2, 10)


def test_the_caller_may_write_into_a_batch() -> None:
    source = counting(100)
    batches = Batches(source, batch=2, context=10, seed=4)
    before = batches.batch(0)[0].copy()
    batches.batch(0)[0][:] = 0
    assert np.array_equal(batches.batch(0)[0], before)


def test_a_corpus_shorter_than_the_context() -> None:
    with pytest.raises(UserError, match="counting has 64 tokens, too few for a context of 64"):
        Batches(counting(64), batch=1, context=64, seed=0)
    Batches(counting(65), batch=1, context=64, seed=0).batch(3)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"context": 0}, {"rank": 2, "ranks": 2}, {"rank": -1}])
def test_impossible_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError):
        Batches(counting(100), **({"batch": 1, "context": 4, "seed": 0} | wrong))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(2, 300), batch=st.integers(1, 5), context=st.integers(1, 40))
def test_evaluation_sees_every_target_once(length: int, batch: int, context: int) -> None:
    seen = []
    for tokens, targets in evaluation_batches(counting(length, pieces=2), batch=batch, context=context, limit=None):
        assert tokens.shape == targets.shape == (batch, context)
        real = targets != IGNORE_INDEX
        assert np.array_equal(targets[real], tokens[real] + 1)
        seen += targets[real].tolist()
    assert seen == list(range(1, length))


def test_limited_evaluation_is_fixed_and_spread() -> None:
    source = counting(10000)
    batches = list(evaluation_batches(source, batch=5, context=10, limit=4))
    again = list(evaluation_batches(source, batch=5, context=10, limit=4))
    assert np.array_equal(np.array(batches), np.array(again))
    starts = np.concatenate([tokens[:, 0] for tokens, _ in batches])
    assert len(batches) == 4
    assert np.array_equal(starts, np.arange(20) * 500)


@pytest.mark.parametrize(("length", "limit"), [(2, None), (10_000, 4), (101, None), (103, 1), (103, 99)])
def test_windows_of_an_evaluation_are_counted_beforehand(length: int, limit: int | None) -> None:
    shape = {"batch": 5, "context": 10, "limit": limit}
    batches = evaluation_batches(counting(length), **shape)
    filled = sum(int((targets != IGNORE_INDEX).any(axis=1).sum()) for _, targets in batches)
    assert evaluation_windows(counting(length), **shape) == filled


def test_evaluation_needs_two_tokens() -> None:
    with pytest.raises(UserError, match="needs at least 2"):
        next(evaluation_batches(counting(1), batch=1, context=4, limit=None))


def test_ids_of_foreign_shards_are_checked_when_read() -> None:
    source = TokenSource("shards", [np.array([1, 2, 900, 3], dtype=np.uint16)], vocabulary=100)
    with pytest.raises(UserError, match=r"shards holds token id 900 \(token 2\), outside the vocabulary of 100"):
        source.read(0, 4)
    large = TokenSource("shards", [np.array([1, 2**31 + 5], dtype=np.uint32)], vocabulary=100)
    with pytest.raises(UserError, match="token id 2147483653"):
        large.read(0, 2)


def test_reading_over_array_borders_and_the_end() -> None:
    source = counting(10, pieces=4)
    for start in range(10):
        for count in range(11):
            assert source.read(start, count).tolist() == [(start + i) % 10 for i in range(count)]
    part = TokenSource("part", [np.arange(10, dtype=np.uint16)], vocabulary=10, start=3, stop=7)
    assert len(part) == 4
    assert part.read(2, 4).tolist() == [5, 6, 3, 4]
