"""Runs the same launches under many orders of threads and asks for the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cllm_gpu.simulator.errors import KernelError
from cllm_gpu.simulator.launch import Schedule
from cllm_gpu.simulator.settings import settings

Arrays = Sequence[np.ndarray[Any, Any]]


def schedules(count: int = 20) -> list[Schedule]:
    """`count` different schedules: in order first, then random ones, copies lazy and eager in turn."""
    return [Schedule(seed=i // 2, lazy_copies=i % 2 == 0) for i in range(count)]


def check_schedules(run: Callable[[], Arrays], count: int = 20) -> Arrays:
    """Call `run` under `count` schedules; it launches kernels on arrays it makes anew and returns the results.

    Returns the results of the first run. Raises KernelError ("race") naming the array, the element and the schedule
    where another run gives other bits.
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
