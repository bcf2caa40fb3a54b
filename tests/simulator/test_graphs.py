"""What a capture records, what a replay does, and what a captured step must not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.simulator import RawModule
from cllm_gpu.simulator.errors import CaptureError
from cllm_gpu.simulator.graphs import DeviceArray, array, capture, empty, library_call
from cllm_gpu.utils.compiler import find_compiler

SCALE = 'extern "C" __global__ void scale(const float* f, float* x, float more) { x[threadIdx.x] *= *f + more; }'


def _ones(*shape: int) -> DeviceArray:
    array = empty(shape, np.float32)
    array[...] = 1.0
    return array


def _scale() -> Any:
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    return RawModule(SCALE).get_function("scale")


def test_a_replay_reads_arrays_anew_and_numbers_as_they_were() -> None:
    kernel, x, factor, more = _scale(), _ones(4), _ones(1), 1.0

    def step() -> None:
        kernel((1,), (4,), (factor, x, np.float32(more)))

    graph = capture(step)
    assert len(graph) == 1
    assert x.tolist() == [1, 1, 1, 1], "a capture computes nothing"
    factor[0], more = 4.0, 100.0
    graph.launch()
    assert x.tolist() == [5, 5, 5, 5]
    graph.launch()
    assert x.tolist() == [25, 25, 25, 25]


def test_assignments_functions_and_library_calls_are_replayed_in_order() -> None:
    x, y, total = _ones(3, 2), _ones(2, 2), _ones(3, 2)

    def product(a: Any, b: Any, out: Any) -> None:
        assert type(a) is np.ndarray
        out[...] = a @ b

    def step() -> None:
        x[1:] = 3.0
        np.multiply(x, 2.0, out=x)
        library_call(product, x, y, out=total)
        np.add(total, total[0], out=total)
        total[2, :1] = y[0, :1]

    graph = capture(step)
    assert total.tolist() == [[1, 1]] * 3
    y[...] = 0.5
    graph.launch()
    assert total.tolist() == [[4, 4], [8, 8], [0.5, 8]]


@pytest.mark.parametrize(
    ("forbidden", "what"),
    [
        (lambda x: float(x[0, 0]), "reads an element"),
        (lambda x: float(x[:1, 0].reshape(())), "on the host"),
        (lambda x: int(x[:1, 0].reshape(())), "on the host"),
        (lambda x: bool(x[:1, :1]), "on the host"),
        (lambda x: x.item(0), "on the host"),
        (lambda x: x.tolist(), "on the host"),
        (lambda x: x.tobytes(), "on the host"),
        (lambda x: list(x[0]), "reads an element"),
        (lambda x: x + 1, "allocates the result of add"),
        (lambda x: x.sum(), "allocates the result of add"),
        (lambda x: x.max(), "allocates the result of maximum"),
        (lambda x: x @ x.T, "allocates the result of matmul"),
        (lambda x: x.astype(np.float64), "allocates an array"),
        (lambda x: x.copy(), "allocates an array"),
        (lambda x: x[:, :3].reshape(-1), "allocates an array"),
        (lambda x: x[[0, 1]], "allocates an array"),
        (lambda x: np.argsort(x), "calls numpy.argsort"),
        (lambda x: np.where(x, x, x), "calls numpy.where"),
        (lambda x: array(np.ones(3)), "brings a host array to the device"),
        (lambda x: empty(3), "allocates an array of 3 float64"),
        (lambda x: x.__setitem__(0, np.ones(4, np.float32)), "gives an assignment an array of shape"),
        (lambda x: np.add(x, np.ones(4, np.float32), out=x), "gives add an array of shape"),
        (lambda x: library_call(print, np.ones(2)), "gives print an array of shape"),
        (lambda x: capture(lambda: None), "a capture is under way already"),
    ],
)
def test_a_captured_step_must_not(forbidden: Callable[[Any], Any], what: str) -> None:
    """And may, outside of a capture, all the same."""
    x = _ones(3, 4)
    with pytest.raises(CaptureError, match=what):
        capture(lambda: forbidden(x))
    forbidden(x)


def test_a_kernel_takes_only_arrays_of_the_device() -> None:
    kernel, x = _scale(), _ones(4)
    with pytest.raises(CaptureError, match=r"gives kernel scale an array of shape \(1,\) that is not the device's"):
        capture(lambda: kernel((1,), (4,), (np.ones(1, np.float32), x, np.float32(0))))
    kernel((1,), (4,), (np.ones(1, np.float32), x, np.float32(1)))
    assert x.tolist() == [2, 2, 2, 2]


def test_a_capture_that_failed_leaves_no_trace() -> None:
    x = _ones(3)
    with pytest.raises(CaptureError):
        capture(lambda: float(x.sum()))
    assert float(x.sum()) == 3.0
    x[...] = 2.0
    assert x.tolist() == [2, 2, 2]


def test_outside_of_a_capture_results_are_plain_arrays() -> None:
    x = _ones(3)
    assert type(x + x) is np.ndarray
    assert type(x[1:]) is DeviceArray
    x += 1.0
    assert type(x) is DeviceArray
    assert x.tolist() == [2, 2, 2]
