"""The most that a GPU can compute: floating-point operations (FLOP) per second, known from its data or measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.ops.precision import Precision, storage_dtype

RATES: dict[tuple[int, int], dict[Precision, int]] = {
    (8, 0): {"bf16": 2048, "tf32": 1024, "fp32": 128},
    (8, 6): {"bf16": 1024, "tf32": 512, "fp32": 256},
    (8, 9): {"bf16": 1024, "tf32": 512, "fp32": 256},
    (9, 0): {"bf16": 4096, "tf32": 2048, "fp32": 256},
    (10, 0): {"bf16": 8192, "tf32": 4096, "fp32": 256},
    (12, 0): {"bf16": 1024, "tf32": 512, "fp32": 256},
}
"""Compute capability → FLOP per clock and multiprocessor: dense, float32 sums, a multiply-add counted as two.

NVIDIA's architecture white papers: A100 (8.0), GA102 (8.6), Ada (8.9), H100 (9.0), RTX Blackwell (12.0); data sheet of
the B200 (10.0).
"""
HALVED = "GeForce"
"""In the name of cards whose tensor cores add in float32 at half these rates (GA102, Ada and RTX Blackwell papers)."""
CLOCK_ATTRIBUTE = 13
"""cudaDevAttrClockRate, kHz: from CUDA 13 on no longer among a device's properties."""
MEASURED_SIZE, MEASURED_CALLS = 8192, 10


@dataclass(frozen=True)
class Peak:
    """What a card can do at most."""

    flop_per_second: float
    source: str
    """Where it is from, in words."""


def known_peak(
    name: str, capability: tuple[int, int], multiprocessors: int, clock_hertz: float, precision: Precision
) -> Peak | None:
    """Multiprocessors × RATES × clock; None for a compute capability that is not among them, or without a clock.

    clock_hertz: the highest the driver names. It may be above the one of the maker's own figure (an H100's 989 TFLOP/s
    are at 1.83 GHz), which makes the peak higher and the MFU lower.
    """
    rates = RATES.get(capability)
    if rates is None or not (clock_hertz > 0):
        return None
    rate = rates[precision] // (2 if HALVED in name and precision != "fp32" else 1)
    source = (
        f"the peak in {precision} of {multiprocessors} multiprocessors × {rate} FLOP/clock × "
        f"{clock_hertz / 1e9:.4g} GHz (compute capability {capability[0]}.{capability[1]})"
    )
    return Peak(multiprocessors * rate * clock_hertz, source)


def card_peak(runtime: Any, device: int, precision: Precision) -> Peak | None:
    """`known_peak` of a device as `runtime` (cupy.cuda.runtime) describes it."""
    properties = runtime.getDeviceProperties(device)
    return known_peak(
        properties["name"].decode(),
        (properties["major"], properties["minor"]),
        properties["multiProcessorCount"],
        1e3 * runtime.deviceGetAttribute(CLOCK_ATTRIBUTE, device),
        precision,
    )


def measured_peak(
    multiply: Callable[[Any, Any, Any], None],
    xp: Any,
    precision: Precision,
    synchronize: Callable[[], None],
    *,
    size: int = MEASURED_SIZE,
    clock: Callable[[], float] = time.perf_counter,
) -> Peak:
    """The rate of a square matrix product, for a card that RATES does not have: the fastest of a few calls.

    multiply(x, weight, out): out = x · weightᵀ, all (size, size) in the precision's storage. Operands are normal random
    numbers: of zeros a card computes products faster.
    """
    dtype = storage_dtype(precision)
    values = np.random.default_rng(0).standard_normal((size, size), np.float32).astype(dtype)
    x, out = xp.asarray(values), xp.empty((size, size), dtype)
    best = float("inf")
    for call in range(1 + MEASURED_CALLS):
        synchronize()
        begun = clock()
        multiply(x, x, out)
        synchronize()
        if call:  # the first one chooses an algorithm
            best = min(best, clock() - begun)
    source = f"as measured in {precision} by a matrix product of {size}³ (no peak is known of this card)"
    return Peak(2.0 * size**3 / best, source)
