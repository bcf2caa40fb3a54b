"""How a call is timed, on a fake card whose clock passes only inside calls."""

from __future__ import annotations

import numpy as np
import pytest

from bench.kernels import timing
from bench.kernels.timing import LEAST_REPEATS, MOST_REPEATS, Card, Rehearsal, summarize
from cllm_gpu.utils.compiler import find_compiler
from tests.bench.fakes import Clock, FakeCupy


class Bench:
    """A card on a fake clock, and a call that takes the given milliseconds, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, seconds: float = 0.4) -> None:
        self.clock = Clock()
        monkeypatch.setattr(timing.time, "perf_counter", self.clock)
        self.card = Card(FakeCupy(self.clock), seconds=seconds)
        self.milliseconds = [3.0]
        self.calls = 0

    def call(self) -> None:
        self.clock.now += 1e-3 * self.milliseconds[self.calls % len(self.milliseconds)]
        self.calls += 1

    def prepare(self) -> None:
        self.clock.now += 5.0  # must not count


def test_the_median_of_the_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.milliseconds = [2.0, 2.0, 2.0, 50.0]
    found = bench.card.time(bench.call, bench.prepare)
    assert found is not None
    assert found.median == pytest.approx(2.0)
    assert found.repeats == LEAST_REPEATS  # a repeat takes seconds of preparation


@pytest.mark.parametrize(("milliseconds", "repeats"), [(1e-3, MOST_REPEATS), (4.0, 100), (1000.0, LEAST_REPEATS)])
def test_as_many_repeats_as_the_time_allows(monkeypatch: pytest.MonkeyPatch, milliseconds: float, repeats: int) -> None:
    bench = Bench(monkeypatch)
    bench.milliseconds = [milliseconds]
    found = bench.card.time(bench.call)
    assert found is not None
    assert abs(found.repeats - repeats) <= 1


def test_a_summary_needs_two_calls() -> None:
    with pytest.raises(ValueError, match="fewer than two"):
        summarize([1.0])


def test_random_data_repeats_beyond_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    monkeypatch.setattr(timing, "BLOCK", 10)
    device = Rehearsal()
    x = device.random((5, 5), "float32", seed=3).ravel()
    assert np.array_equal(x[:10], x[10:20])
    assert np.array_equal(x[:5], x[20:])
    assert len(set(x[:10])) == 10
    assert not np.array_equal(x, device.random((5, 5), "float32", seed=4).ravel())
