"""Optimizers and norm on flat buffers, against the float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.adam import adam_step, adam_step_on_device
from cllm_gpu.ops.cuda.sgd import sgd_step, sgd_step_on_device
from cllm_gpu.ops.cuda.squared_norm import THREADS, squared_norm, squared_norm_on_device
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference import adam as reference_adam
from cllm_gpu.ops.reference import sgd as reference_sgd
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.comparison import close
from tests.ops.cuda.devices import BFLOAT16, DTYPES, Device

SIZES = [1, 3, 4, 255, 1024, 5001]
FIRST = [0, 6, 2**34 + 1]
"""Elements before the array in its flat buffer: none, no multiple of four, above 2^32."""
ADAM = {"rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1}


def _state(rng: np.random.Generator, size: int) -> list[np.ndarray[Any, Any]]:
    p, g, m = (rng.standard_normal(size).astype(np.float32) for _ in range(3))
    return [p, g, m, rng.random(size).astype(np.float32)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_step(device: Device, rng: Any, size: int, decoupled: bool) -> None:
    state = _state(rng, size)
    ours, theirs = [device.put(x) for x in state], [x.astype(np.float64) for x in state]
    for step in (1, 2, 3):
        options: dict[str, Any] = ADAM | {"step": step, "decayed": size // 3, "decoupled": decoupled}
        moved = adam_step(device.launcher, *ours, gradient_scale=0.5, **options)
        want = reference_adam.adam_step(np, *theirs, gradient_scale=0.5, **options)
        assert abs(moved - want) <= 1e-5 * want
    for name, got, expected, before in zip("pgmv", ours, theirs, state, strict=True):
        close(name, device.get(got), expected, storage="float32", factor=30)
        assert name == "g" or not np.array_equal(device.get(got), before)


def test_adam_step_in_mixed_precision(device: Device, rng: Any) -> None:
    """bf16 gradients and copy, fp32 masters, clipping by a scalar on the device, gradients zeroed."""
    p, g, m, v = _state(rng, 1001)
    gradients = g.astype(BFLOAT16)
    master, first, second = device.put(p), device.put(m), device.put(v)
    given, copy = device.put(gradients), device.put(np.zeros(1001, BFLOAT16))
    options: dict[str, Any] = ADAM | {"step": 5, "decayed": 500, "decoupled": True}
    moved = adam_step_on_device(
        device.launcher, master, given, first, second, gradient_scale=2.0, copy=copy,
        clip=device.put(np.array([0.25], np.float32)), zero_gradients=True, measure=True, **options,
    )  # fmt: skip
    theirs = [x.astype(np.float64) for x in (p, gradients, m, v)]
    want = reference_adam.adam_step(np, *theirs, gradient_scale=0.5, **options)
    assert abs(float(device.get(moved)[0]) - want) <= 1e-5 * want
    close("p", device.get(master), theirs[0], storage="float32", factor=20)
    assert np.array_equal(device.get(copy), device.get(master).astype(BFLOAT16))
    assert not device.get(given).astype(np.float32).any()


def test_a_skipped_adam_step_writes_nothing(device: Device, rng: Any) -> None:
    state = _state(rng, 300)
    state[1][7] = np.inf
    ours = [device.put(x) for x in state]
    skip, clip = device.put(np.ones(1, np.int32)), device.put(np.zeros(1, np.float32))
    options: dict[str, Any] = ADAM | {"step": 1, "decayed": 0, "decoupled": True, "gradient_scale": 1.0}
    moved = adam_step_on_device(device.launcher, *ours, skip=skip, clip=clip, measure=True, **options)
    assert float(device.get(moved)[0]) == 0.0
    for got, before in zip(ours, state, strict=True):
        assert np.array_equal(device.get(got), before)


def test_adam_adds_epsilon_to_the_root(device: Device, rng: Any) -> None:
    """An epsilon as large as the roots: 1e-8 does not show beside them."""
    state = _state(rng, 50)
    ours, theirs = [device.put(x) for x in state], [x.astype(np.float64) for x in state]
    options: dict[str, Any] = ADAM | {"epsilon": 0.5, "step": 100, "decayed": 0, "decoupled": True}
    moved = adam_step(device.launcher, *ours, gradient_scale=1.0, **options)
    want = reference_adam.adam_step(np, *theirs, gradient_scale=1.0, **options)
    assert abs(moved - want) <= 1e-5 * want
    moves = [x - state[0] for x in (device.get(ours[0]).astype(np.float64), theirs[0])]
    # a parameter of up to 4 has a rounding of 2^-23, and moves by about 0.01
    assert np.abs(moves[0] - moves[1]).max() <= 2.0**-22
    assert np.abs(moves[1]).max() >= 2.0**-10


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_adam_zeroes_the_gradients_when_asked(device: Device, rng: Any, size: int, storage: str) -> None:
    state = _state(rng, size)
    state[1] = state[1].astype(DTYPES[storage])
    options: dict[str, Any] = ADAM | {"step": 1, "decayed": 0, "decoupled": True, "gradient_scale": 1.0}
    kept, zeroed = ([device.put(x) for x in state] for _ in range(2))
    adam_step_on_device(device.launcher, *kept, **options)
    adam_step_on_device(device.launcher, *zeroed, zero_gradients=True, **options)
    assert np.array_equal(device.get(kept[1]), state[1])
    assert np.array_equal(device.get(zeroed[1]), np.zeros_like(state[1]))
    for i in (0, 2, 3):
        assert np.array_equal(device.get(zeroed[i]), device.get(kept[i]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_step(device: Device, rng: Any, size: int, momentum: float) -> None:
    p, g, u, _ = _state(rng, size)
    velocity = device.put(u) if momentum else None
    parameters, gradients = device.put(p), device.put(g)
    theirs = [x.astype(np.float64) for x in (p, g, u)]
    options: dict[str, Any] = {"rate": 0.1, "momentum": momentum, "weight_decay": 0.2, "decayed": size // 2}
    moved = sgd_step(device.launcher, parameters, gradients, velocity, gradient_scale=0.5, **options)
    want_velocity = theirs[2] if momentum else None
    want = reference_sgd.sgd_step(np, *theirs[:2], want_velocity, gradient_scale=0.5, **options)
    assert abs(moved - want) <= 1e-5 * want
    close("p", device.get(parameters), theirs[0], storage="float32", factor=10)
    if velocity is not None:
        close("u", device.get(velocity), theirs[2], storage="float32", factor=10)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_every_argument_of_the_sgd_kernel(device: Device, rng: Any, storage: str, zero: bool, skip: bool) -> None:
    """Those too that sgd_step leaves out: the rounded copy, clipping and skipping on the device, zeroed gradients."""
    size, dtype = 1027, DTYPES[storage]  # two blocks and a remainder
    p, g, u, _ = _state(rng, size)
    g, blocks = g.astype(dtype), 2
    host = {"parameters": p, "gradients": g, "velocity": u, "copy": np.ones(size, dtype)}
    host |= {"clip": np.array([0.25], np.float32), "skip": np.array([skip], np.int32), "moved": np.zeros(blocks)}
    host |= {"numbers": np.array([0.1], np.float32)}
    arrays = {name: device.put(x) for name, x in host.items()}
    numbers = {"size": size, "decayed": 500, "scale": 2.0, "momentum": 0.9, "decay": 0.2}
    arguments = arrays | numbers | {"zero_gradients": int(zero)}
    arguments |= {"rounding.seed": 0, "rounding.step": None, "rounding.first_element": 0}
    device.launcher.launch(Variant("adam.cu", storage), "sgd_step", (blocks,), THREADS, arguments)
    got = {name: device.get(x) for name, x in arrays.items()}
    if skip:
        assert all(np.array_equal(got[name], before) for name, before in host.items())
        return
    theirs = [x.astype(np.float64) for x in (p, g, u)]
    options: dict[str, Any] = {"rate": 0.1, "momentum": 0.9, "weight_decay": 0.2, "decayed": 500}
    moved = reference_sgd.sgd_step(np, *theirs, gradient_scale=0.5, **options)
    assert abs(got["moved"].sum() - moved) <= 1e-5 * moved
    close("p", got["parameters"], theirs[0], storage="float32", factor=10)
    close("u", got["velocity"], theirs[2], storage="float32", factor=10)
    assert np.array_equal(got["copy"], got["parameters"].astype(dtype))
    assert np.array_equal(got["gradients"], np.zeros_like(g) if zero else g)


@pytest.mark.parametrize("size", [0, *SIZES, 70001])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_squared_norm(device: Device, rng: Any, size: int, dtype: Any) -> None:
    x = rng.standard_normal(size).astype(np.float32).astype(dtype)
    want = float((x.astype(np.float64) ** 2).sum())
    assert abs(squared_norm(device.launcher, device.put(x)) - want) <= 1e-12 * want


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_squared_norm_shows_what_is_not_finite(device: Device, value: float) -> None:
    x = np.ones(3000, np.float32)
    x[2047] = value
    assert not np.isfinite(squared_norm(device.launcher, device.put(x)))


def test_a_sum_goes_where_it_is_asked_for(device: Device) -> None:
    x, totals = device.put(np.full(16, 3.0, np.float32)), device.put(np.full(3, -1.0))
    squared_norm_on_device(device.launcher, x, total=totals[1:2])
    assert device.get(totals).tolist() == [-1.0, 144.0, -1.0]
    state = [device.put(np.full(16, value, np.float32)) for value in (1.0, 3.0, 0.0)]
    moved = sgd_step_on_device(
        device.launcher, *state, numbers=device.put(np.array([0.5], np.float32)), momentum=0.9, weight_decay=0.0,
        decayed=0, gradient_scale=1.0, clip=device.put(np.array([0.5], np.float32)), total=totals[2:],
    )  # fmt: skip
    assert device.get(totals).tolist() == [-1.0, 144.0, 16 * 0.75**2]
    assert device.get(moved)[0] == 16 * 0.75**2
    assert device.get(state[0]).tolist() == [0.25] * 16


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("size", SIZES)
def test_adam_without_masters_draws_the_references_bits(device: Device, rng: Any, size: int, first: int) -> None:
    """A decay by 2^-9 is exact in float32, so both sides round the same numbers and every bit must agree."""
    p, zeros = rng.standard_normal(size).astype(BFLOAT16), np.zeros(size, np.float32)
    host = [p, zeros.astype(BFLOAT16), zeros, zeros]
    ours, theirs = [device.put(x) for x in host], [x.copy() for x in host]
    options: dict[str, Any] = ADAM | {"rate": 2.0**-4, "weight_decay": 2.0**-5, "decayed": size - size // 3}
    options |= {"step": 1, "decoupled": True, "gradient_scale": 1.0}
    for step in (0, 2**32 - 1):
        rounding = StochasticRounding(2**63 + 5, step, first)
        moved = adam_step(device.launcher, *ours, rounding=rounding, **options)
        want = reference_adam.adam_step(np, *theirs, rounding=rounding, **options)
        assert abs(moved - want) <= 1e-12 * want
        assert np.array_equal(device.get(ours[0]), theirs[0])
    assert np.array_equal(theirs[0][options["decayed"] :], p[options["decayed"] :])
    assert size < 255 or not np.array_equal(theirs[0], p)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sgd_without_masters_draws_the_references_bits(device: Device, rng: Any, momentum: float, first: int) -> None:
    """Steps of 2^-10 on numbers of 2^-7 between 1 and 2: exact in float32."""
    size = 1027
    p = (rng.integers(128, 256, size) / 128).astype(BFLOAT16)
    g = rng.integers(-8, 9, size).astype(BFLOAT16)
    u = rng.integers(-4, 5, size).astype(np.float32) if momentum else None
    ours, theirs = [None if x is None else device.put(x) for x in (p, g, u)], [p.copy(), g, u]
    options: dict[str, Any] = {"rate": 2.0**-10, "momentum": momentum, "weight_decay": 0.0, "decayed": 0}
    rounding = StochasticRounding(7, 3, first)
    moved = sgd_step(device.launcher, *ours, gradient_scale=1.0, rounding=rounding, **options)
    want = reference_sgd.sgd_step(np, *theirs, gradient_scale=1.0, rounding=rounding, **options)
    assert abs(moved - want) <= 1e-12 * want
    assert np.array_equal(device.get(ours[0]), theirs[0])
    assert not np.array_equal(theirs[0], p)


def test_adam_without_masters_steps_as_with_them(device: Device, rng: Any) -> None:
    """Moments to the bit; the weights are a neighbour of the master's: less than a unit of the last of 8 bits away."""
    p, g, m, v = _state(rng, 1001)
    p, g = p.astype(BFLOAT16), g.astype(BFLOAT16)
    alone, both = ([device.put(x) for x in (start, g, m, v)] for start in (p, p.astype(np.float32)))
    options: dict[str, Any] = ADAM | {"step": 5, "decayed": 500, "decoupled": False, "gradient_scale": 0.5}
    moved = adam_step(device.launcher, *alone, rounding=StochasticRounding(1, 2), **options)
    assert moved == adam_step(device.launcher, *both, **options)
    for got, want in zip(alone[2:], both[2:], strict=True):
        assert np.array_equal(device.get(got), device.get(want))
    got, want = device.get(alone[0]).astype(np.float64), device.get(both[0]).astype(np.float64)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(want))) - 7)
    assert np.all(np.abs(got - want) < ulp)
    assert np.any(np.abs(got - want) > 0.5 * ulp), "no weight was rounded away from its nearest"


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_float32_gradients_beside_bfloat16_weights(device: Device, rng: Any, name: str, masters: bool) -> None:
    """The same numbers in float32 give every bit they give in bfloat16; more digits are not rounded away."""
    p, g, m, v = _state(rng, 1001)
    g = g.astype(BFLOAT16).astype(np.float32)
    options: dict[str, Any] = {"weight_decay": 0.1, "decayed": 500, "gradient_scale": 0.5, "rate": 1e-2}
    options |= ADAM | {"step": 5, "decoupled": True} if name == "adam" else {"momentum": 0.9}
    options["rounding"] = None if masters else StochasticRounding(1, 2)
    step = adam_step if name == "adam" else sgd_step
    found = []
    for gradients in (g.astype(BFLOAT16), g, g * np.float32(1 + 2.0**-12)):
        start = [p if masters else p.astype(BFLOAT16), gradients, m, *([v] if name == "adam" else [])]
        arrays = [device.put(x) for x in start]
        copy = device.put(np.zeros(1001, BFLOAT16)) if masters else None
        step(device.launcher, *arrays, copy, **options)
        found.append([device.get(x).copy() for x in (arrays[0], *arrays[2:], *([copy] if masters else []))])
        assert np.array_equal(device.get(arrays[1]), gradients)
    assert all(np.array_equal(*pair) for pair in zip(*found[:2], strict=True))
    moments = found[1][1].astype(np.float64), found[2][1].astype(np.float64)
    assert np.median(moments[0] != moments[1]) == 1


def test_what_is_not_finite_stays_so(device: Device) -> None:
    """All bits of a NaN set, random bits below would carry into its sign; the largest number may become infinite."""
    p = np.array([1.0, np.inf, -np.inf, 1.0], BFLOAT16)
    first = np.array([0x7FFFFFFF, 0, 0, 0], np.uint32).view(np.float32)
    zeros = np.zeros(4, np.float32)
    arrays = [device.put(x) for x in (p, zeros.astype(BFLOAT16), first, zeros)]
    options: dict[str, Any] = ADAM | {"step": 1, "decayed": 0, "decoupled": True, "gradient_scale": 1.0}
    adam_step(device.launcher, *arrays, rounding=StochasticRounding(1, 1), **options)
    got = device.get(arrays[0]).astype(np.float32)
    assert np.isnan(got[0])
    assert np.array_equal(got[1:], p[1:].astype(np.float32))


def test_a_skipped_step_without_masters_writes_nothing(device: Device, rng: Any) -> None:
    host = [x.astype(kind) for x, kind in zip(_state(rng, 300), (BFLOAT16, BFLOAT16, "f4", "f4"), strict=True)]
    ours = [device.put(x) for x in host]
    options: dict[str, Any] = ADAM | {"step": 1, "decayed": 0, "decoupled": True, "gradient_scale": 1.0}
    skip = device.put(np.ones(1, np.int32))
    adam_step_on_device(device.launcher, *ours, rounding=StochasticRounding(1, 1), skip=skip, **options)
    for got, before in zip(ours, host, strict=True):
        assert np.array_equal(device.get(got), before)


def test_stochastic_rounding_is_of_bfloat16_alone(device: Device, rng: Any) -> None:
    state = [device.put(x) for x in _state(rng, 8)]
    options: dict[str, Any] = ADAM | {"step": 1, "decayed": 0, "decoupled": True, "gradient_scale": 1.0}
    with pytest.raises(UserError, match="adam_step: stochastic rounding is of bfloat16 parameters that have no copy"):
        adam_step(device.launcher, *state, rounding=StochasticRounding(1, 1), **options)
