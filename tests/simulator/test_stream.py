"""The simulated streams: one does its work at once, one as late as it may, and a missing wait between them shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.simulator.stream import SimulatedStream
from cllm_gpu.training.input_staging import InputStaging


def _arrays(stream: SimulatedStream, *values: float) -> list[Any]:
    return [stream.array(np.full(2, value)) for value in values]


def test_work_is_done_at_once() -> None:
    stream = SimulatedStream()
    host, (x, y) = stream.pinned((2,), np.float64), _arrays(stream, 1.0, 2.0)
    host[...] = 5.0
    stream.upload(host, x)
    stream.copy(x, y)
    x *= 2
    stream.download(x, host)
    assert (x.tolist(), y.tolist(), host.tolist()) == ([10, 10], [5, 5], [10, 10])
    stream.record_event().synchronize()


def test_work_is_done_as_late_as_it_may() -> None:
    """Up to the place that is waited for, in order, and once."""
    stream = SimulatedStream().another()
    host, (x, y) = stream.pinned((2,), np.float64), _arrays(stream, 1.0, 2.0)
    stream.copy(x, y)
    first = stream.record_event()
    stream.download(y, host)
    last = stream.record_event()
    x[...] = 7.0
    assert y.tolist() == [2, 2]
    first.synchronize()
    assert (y.tolist(), host.tolist()) == ([7, 7], [0, 0])
    last.synchronize()
    assert host.tolist() == [7, 7]
    x[...] = y[...] = 9.0
    first.synchronize()
    last.synchronize()
    assert host.tolist() == [7, 7]


def test_a_late_stream_is_done_before_work_that_python_makes() -> None:
    """Such work allocates and compiles as it is enqueued, so it cannot be put off."""
    stream = SimulatedStream(late=True)
    x, y = _arrays(stream, 1.0, 2.0)
    stream.copy(x, y)
    stream.run(lambda: y.__iadd__(1.0))
    assert y.tolist() == [2, 2]


@pytest.mark.parametrize("late", [False, True])
def test_a_stream_follows_another(late: bool) -> None:
    stream = SimulatedStream(late=late)
    other = stream.another()
    x, y, z = _arrays(stream, 1.0, 2.0, 3.0)
    other.copy(x, y)
    stream.wait_event(other.record_event())
    stream.copy(y, z)
    x[...] = 4.0
    stream.record_event().synchronize()
    assert (y.tolist(), z.tolist()) == ([1, 1], [1, 1])


@pytest.mark.parametrize("late", [False, True])
def test_a_graph_is_launched_in_order(late: bool) -> None:
    stream = SimulatedStream(late=late)
    x, y = (stream.empty(2, np.float64) for _ in range(2))
    x[...], y[...] = 1.0, 2.0
    graph = stream.capture(lambda: np.add(x, x, out=x))
    stream.copy(x, y)
    graph.launch()
    stream.copy(x, y)
    assert (x.tolist(), y.tolist()) == ([1.0, 1.0], [2.0, 2.0]) if late else ([2.0, 2.0], [2.0, 2.0])
    stream.record_event().synchronize()
    assert (x.tolist(), y.tolist()) == ([2.0, 2.0], [2.0, 2.0])


# ---- what the staging of inputs relies on


class Unordered(InputStaging):
    """Staging of which one of its two waits is forgotten."""

    def __init__(self, *arguments: Any, forgets: str) -> None:
        super().__init__(*arguments)
        forgetful = self._copies if forgets == "free" else self._stream
        forgetful.wait_event = lambda event: None  # type: ignore[method-assign]


def _steps(*, late: bool, forgets: str | None = None) -> list[float]:
    """Three numbers uploaded, each while the step before has not been waited for, as each step saw its own."""
    stream = SimulatedStream(late=late)
    staging, inputs = _arrays(stream, -1.0, -2.0)
    arrays = stream, staging, inputs
    staged = InputStaging(*arrays) if forgets is None else Unordered(*arrays, forgets=forgets)
    hosts, results = ([stream.pinned((2,), np.float64) for _ in range(2)] for _ in range(2))
    events, seen = [], []
    for step in range(4):
        if step < 3:
            hosts[step % 2][...] = step
            staged.upload(hosts[step % 2])
            stream.download(inputs, results[step % 2])
            events.append(stream.record_event())
        if step > 0:
            events[step - 1].synchronize()
            seen.append(float(results[(step - 1) % 2][0]))
    return seen


@pytest.mark.parametrize("late", [False, True])
def test_every_step_sees_what_was_sent_for_it(late: bool) -> None:
    assert _steps(late=late) == [0, 1, 2]


def test_a_step_that_does_not_wait_for_what_is_sent_is_caught() -> None:
    assert _steps(late=False, forgets="uploaded") != [0, 1, 2]


def test_sending_that_does_not_wait_for_what_is_taken_is_caught() -> None:
    assert _steps(late=True, forgets="free") != [0, 1, 2]
