"""Runs the same launches under many thread schedules and compares the results bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cllm_gpu.simulator.errors import KernelError
from cllm_gpu.simulator.launch import Schedule
from cllm_gpu.simulator.settings import settings

Arrays = Sequence[np.ndarray[Any, Any]]


def schedules(count: int = 20) -> list[Schedule]:
    """`count` different schedules: first in order, then random, alternately with lazy and eager copies."""
    return [Schedule(seed=i // 2, lazy_copies=i % 2 == 0) for i in range(count)]


def check_schedules(run: Callable[[], Arrays], count: int = 20) -> Arrays:
    """Call `run` under `count` schedules. `run` launches kernels on newly allocated arrays and returns the results.

    Returns the results of the first run. Raises KernelError ("race"), naming the array, element and schedule, if
    another run gives different bits.
    """
    orders = schedules(count)
    with settings(schedule=orders[0]):
        first = run()
    for order in orders[1:]:
        with settings(schedule=order):
            again = run()
        for i, (a, b) in enumerate(zip(first, again, strict=True)):
            if a.tobytes() != b.tobytes():
                raise KernelError(_difference(i, a, b, order), "race", 0, (0, 0, 0), (0, 0, 0))
    return first


def _difference(number: int, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], order: Schedule) -> str:
    bytes_a = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
    bytes_b = np.ascontiguousarray(b).view(np.uint8).reshape(b.size, -1)
    places = np.flatnonzero((bytes_a != bytes_b).any(axis=1))
    index = tuple(int(i) for i in np.unravel_index(places[0], a.shape))
    return (
        f"result {number} depends on the order of threads: {places.size} of {a.size} elements differ under {order}, "
        f"the first at {index}: {a[index]} in order, {b[index]} now"
    )
