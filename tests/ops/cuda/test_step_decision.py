"""What a step decides on the device, against the same decisions in Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.step_decision import NUMBERS, THREADS, add_losses, decide_step
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.devices import Device

LARGEST = math.sqrt(float(np.finfo(np.float32).max))
SETTINGS: dict[str, Any] = {
    "beta1": 0.9, "beta2": 0.999, "decay": 0.1, "other_rate": 30.0, "clip_norm": 1.0, "largest": LARGEST,
    "limit": float(np.finfo(np.float32).max) / 4, "carry": 0.9, "gain": 0.1, "amplification": 1e8, "coupled_decay": 0.0,
    "maximum_skipped": 5,
}  # fmt: skip
ROUNDING = 2.0**-23
"""Relative: one rounding to float32, after float64 whose powers differ by some 1e-16 from one library to the next."""


def _decide(
    device: Device,
    loss: float,
    squared: float,
    counts: tuple[int, int] = (6, 0),
    *,
    norms: tuple[float, float] = (1.0, 1.0),
    outcome: float = -1.0,
    rate: float = 3e-3,
    **changes: Any,
) -> dict[str, Any]:
    host = {
        "sums": np.array([loss, squared]),
        "rate": np.array([rate]),
        "counts": np.array(counts, np.int32),
        "numbers": np.full((2, NUMBERS), -1.0, np.float32),
        "clip": np.full(1, -1.0, np.float32),
        "skip": np.full(1, -1, np.int32),
        "draw": np.full(1, 99, np.uint32),
        "outcome": np.full(1, outcome),
        "moved": np.array([9.0, 16.0]),
        "norms": np.array(norms),
    }
    arrays = {name: device.put(x) for name, x in host.items()}
    decide_step(device.launcher, **arrays, storage="float32", **(SETTINGS | changes))
    got = {name: device.get(x) for name, x in arrays.items()}
    assert np.array_equal(got["sums"], host["sums"], equal_nan=True)
    assert got["rate"][0] == rate
    return got


@pytest.mark.parametrize("count", [1, THREADS - 1, THREADS, THREADS + 1, 3 * THREADS + 7])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_losses_are_added_in_float64(device: Device, rng: np.random.Generator, count: int, storage: str) -> None:
    first, second = (rng.random(count, np.float32) * 9 for _ in range(2))
    sums = device.put(np.array([5.0, -2.0]))
    add_losses(device.launcher, device.put(first), sums, accumulate=False, storage=storage)
    want = math.fsum(first)
    assert abs(device.get(sums)[0] - want) <= 1e-14 * want
    add_losses(device.launcher, device.put(second), sums, accumulate=True, storage=storage)
    want += math.fsum(second)
    assert abs(device.get(sums)[0] - want) <= 1e-14 * want
    assert device.get(sums)[1] == -2.0


@pytest.mark.parametrize("updates", [0, 1, 6, 999, 2_000_000])
@pytest.mark.parametrize("squared", [0.0, 0.25, 16.0])
def test_an_applied_step(device: Device, updates: int, squared: float) -> None:
    got = _decide(device, 7.0, squared, (updates, 3))
    step = updates + 1
    clip = min(1.0, 1.0 / (math.sqrt(squared) + 1e-6))
    assert got["clip"][0] == np.float32(clip)
    assert (got["skip"][0], got["outcome"][0], got["draw"][0]) == (0, 0.0, updates)
    assert got["counts"].tolist() == [step, 0]
    rates = np.array([3e-3, 3e-3 * 30.0])
    want = np.stack([rates / (1 - 0.9**step), np.full(2, 1 / (1 - 0.999**step)), rates * 0.1], axis=1)
    assert np.all(np.abs(got["numbers"] - want) <= ROUNDING * want)


def test_no_clipping_and_no_corrections(device: Device) -> None:
    """As for SGD without clipping: both betas are 0, and so is the largest norm."""
    got = _decide(device, 7.0, 1e8, clip_norm=0.0, beta1=0.0, beta2=0.0)
    assert got["clip"][0] == 1.0
    assert np.array_equal(got["numbers"][0], np.array([3e-3, 1.0, 3e-4], np.float32))


@pytest.mark.parametrize(
    ("loss", "squared", "clip_norm"),
    [
        (math.nan, 1.0, 1.0),
        (math.inf, 1.0, 1.0),
        (-math.inf, 1.0, 1.0),
        (1.0, math.nan, 1.0),
        (1.0, math.inf, 1.0),
        (1.0, math.inf, 0.0),
        (1.0, math.nan, 0.0),
        (1.0, (1.001 * LARGEST) ** 2, 0.0),
        (1.0, (1e6 * LARGEST) ** 2, 1e22),
    ],
)
def test_a_step_that_would_do_damage_is_skipped(device: Device, loss: float, squared: float, clip_norm: float) -> None:
    """Loss or norm not finite, or a gradient that is too large to be squared even when clipped."""
    got = _decide(device, loss, squared, (6, 3), clip_norm=clip_norm)
    assert (got["skip"][0], got["outcome"][0], got["draw"][0]) == (1, 1.0, 6)
    assert got["counts"].tolist() == [6, 4]


def test_the_largest_that_is_applied(device: Device) -> None:
    assert _decide(device, 1.0, (0.999 * LARGEST) ** 2, clip_norm=0.0)["skip"][0] == 0
    assert _decide(device, 1.7e308, 1.0)["skip"][0] == 0
    clipped = _decide(device, 1.0, (2 * LARGEST) ** 2, clip_norm=1.0)
    assert clipped["skip"][0] == 0, "clipped, it does no damage"


def test_the_limits_themselves(device: Device) -> None:
    """A norm of exactly the largest is refused; a loss of the largest double is finite."""
    assert _decide(device, float(np.finfo(np.float64).max), 4.0, clip_norm=0.0)["skip"][0] == 0
    assert _decide(device, 1.0, 4.0, clip_norm=0.0, largest=2.0)["skip"][0] == 1


def test_after_too_many_skips_nothing_is_applied_any_more(device: Device) -> None:
    assert _decide(device, 1.0, 1.0, (6, 4))["counts"].tolist() == [7, 0]
    got = _decide(device, 1.0, 1.0, (6, 5))
    assert (got["skip"][0], got["counts"].tolist()) == (1, [6, 6])


@pytest.mark.parametrize("outcome", [0.0, 1.0, 2.0])
def test_the_norms_grow_by_what_was_applied(device: Device, outcome: float) -> None:
    """‖w‖ by √Σ update² of the step before, if it was applied; ‖m‖ as a mean that forgets."""
    norms = _decide(device, 1.0, 0.25, norms=(10.0, 2.0), outcome=outcome)["norms"]
    np.testing.assert_allclose(norms, [15.0 if outcome == 0 else 10.0, 0.9 * 2 + 0.1 * 0.5], rtol=1e-14)


EXTREMES: list[dict[str, Any]] = [
    {"amplification": 1e38, "norms": (1.0, 9.0)},
    {"norms": (1e38, 1.0)},
    {"norms": (math.nan, 1.0)},
    {"norms": (1.0, math.inf)},
    {"norms": (0.0, 0.0), "other_rate": 1e41},
    {"coupled_decay": 1.0, "norms": (2e19, 0.0), "amplification": 1.0},
    {"beta1": 1.0},
]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_an_update_that_could_overflow_is_skipped_and_told_apart(device: Device, extreme: dict[str, Any]) -> None:
    """The same decision as on the host."""
    got = _decide(device, 1.0, 0.25, (6, 3), **extreme)
    assert (got["skip"][0], got["outcome"][0]) == (1, 2.0)
    assert got["counts"].tolist() == [6, 4]
    assert np.array_equal(got["norms"], extreme.get("norms", (1.0, 1.0)), equal_nan=True)


def test_weight_decay_in_the_gradient_reaches_the_moments(device: Device) -> None:
    norms = _decide(device, 1.0, 0.25, norms=(10.0, 2.0), coupled_decay=0.5)["norms"]
    np.testing.assert_allclose(norms, [10.0, 0.9 * 2 + 0.1 * (0.5 + 0.5 * 10)], rtol=1e-14)


AT_THE_LIMIT: list[tuple[float, dict[str, Any]]] = [
    (2.0**-8, {"gain": 0.0, "norms": (0.0, 0.0)}),
    (2.0, {"gain": 1.0, "norms": (0.0, 0.0), "amplification": 4.0}),
    (8 + 2.0**-8 * 0.5 + 2.0**-8 * 0.25 * 8, {"gain": 1.0, "norms": (8.0, 0.0), "decay": 0.25}),
    (4.0, {"gain": 0.0, "norms": (1.5, 0.0), "coupled_decay": 1.0}),
]
"""The limit, and settings with which step size, moments, weights or the squared gradient are exactly that."""


@pytest.mark.parametrize(("limit", "settings"), AT_THE_LIMIT)
def test_what_reaches_the_limit_is_refused(device: Device, limit: float, settings: dict[str, Any]) -> None:
    """Powers of two, so that no product rounds."""
    given = {"rate": 2.0**-8, "other_rate": 1.0, "beta1": 0.0, "carry": 0.0, "amplification": 1.0} | settings
    assert _decide(device, 1.0, 0.25, limit=limit, **given)["outcome"][0] == 2.0
    assert _decide(device, 1.0, 0.25, limit=math.nextafter(limit, math.inf), **given)["outcome"][0] == 0.0


def test_wrong_shapes_are_named(device: Device) -> None:
    with pytest.raises(UserError, match=r"^decide_step: argument counts has shape \(3,\); it must be \(2,\)$"):
        _decide(device, 1.0, 1.0, (1, 2, 3))  # type: ignore[arg-type]
