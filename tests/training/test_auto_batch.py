"""The largest batch that fits the memory there is, and what is said where a plan does not fit."""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import Config, ModelConfig, TrainingConfig
from cllm_gpu.devices import host_memory
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.recompute import LEVELS, Recompute
from cllm_gpu.ops.precision import Precision
from cllm_gpu.training.auto_batch import CPU_SEQUENCES, decide_batch, divisors, memory_shortage, out_of_memory
from cllm_gpu.training.memory_plan import plan_memory
from cllm_gpu.utils.errors import UserError

WINDOWS = 10_000
MODEL = ModelConfig(size="mini")
A = MODEL.architecture(257)
MB = 10**6


def config(**loop: Any) -> Config:
    return Config(model=MODEL, training=TrainingConfig(**loop))


def device(backend: Backend, free: int | None, *, card: bool = False, reserved: float = 0.25) -> Backend:
    """A device with so much free memory; `card`: a GPU, as far as a plan asks."""
    xp = types.SimpleNamespace() if card else backend.xp
    return dataclasses.replace(backend, xp=xp, memory_free=lambda: free, memory_reserved=reserved)


def plan(backend: Backend, batch: int, level: Recompute = "none", a: Architecture = A) -> int:
    return plan_memory(config(batch=batch, recompute=level), a, backend).total


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("free", "workers"), [(120 * MB, 1), (300 * MB, 1), (300 * MB, 3), (2000 * MB, 1)])
def test_the_batch_is_the_largest_that_fits(backend: Backend, free: int, workers: int, level: Recompute) -> None:
    there = device(dataclasses.replace(backend, workers=workers), free, card=True, reserved=0.06)
    chosen, line = decide_batch(config(batch="auto", recompute=level), A, there, WINDOWS)
    batch, room = chosen.training.sequences, int(free * 0.94)
    allowed = [1, 2, 4, *range(8, WINDOWS + 1, 8)]
    assert batch in allowed
    assert plan(there, batch, level) <= room < plan(there, allowed[allowed.index(batch) + 1], level)
    assert line is not None
    assert re.match(rf"batch {batch}: the largest that fits [\d.]+ [MG]B of free memory, 6% of it in reserve \(", line)
    assert f"recompute {level})" in line
    assert chosen == dataclasses.replace(
        config(recompute=level), training=dataclasses.replace(chosen.training, batch=batch)
    )
    assert decide_batch(chosen, A, device(backend, 0), WINDOWS) == (chosen, None)  # a number stays what it is


def test_a_batch_of_a_few(backend: Backend) -> None:
    for batch, found in ((1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (15, 8), (16, 16)):
        there = device(backend, plan(backend, batch), card=True, reserved=0.0)
        assert decide_batch(config(batch="auto"), A, there, WINDOWS)[0].training.batch == found


def test_no_more_than_the_text_has(backend: Backend) -> None:
    for windows, batch in ((3, 2), (21, 16), (0, 1)):
        chosen, line = decide_batch(config(batch="auto"), A, device(backend, 10**12, card=True), windows)
        assert chosen.training.batch == batch
        assert line is not None
        assert f"batch {batch}: the training text has no more sequences" in line


@pytest.mark.parametrize("workers", [1, 2])
def test_on_a_cpu_a_batch_stops_where_more_would_not_be_faster(backend: Backend, workers: int) -> None:
    there = device(dataclasses.replace(backend, workers=workers), 10**12)
    chosen, line = decide_batch(config(batch="auto"), A, there, WINDOWS)
    assert chosen.training.batch == CPU_SEQUENCES * workers
    assert line is not None
    assert f"batch {CPU_SEQUENCES * workers}: 8 for each worker, as on a CPU more are hardly faster" in line
    little = device(backend, plan(backend, 4), reserved=0.0)
    assert decide_batch(config(batch="auto"), A, little, WINDOWS)[0].training.batch == 4


def test_the_micro_batch_is_the_largest_divisor_that_fits(backend: Backend) -> None:
    for room, found in ((11, 6), (12, 12), (5, 4), (1, 1)):
        there = device(backend, plan(backend, room), reserved=0.0)
        chosen, line = decide_batch(config(batch=12, micro_batch="auto"), A, there, WINDOWS)
        assert (chosen.training.batch, chosen.training.micro_batch) == (12, found)
        assert line is not None
        assert line.startswith(f"micro-batch {found} of batch 12: {'all of it' if found == 12 else 'the largest that'}")
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_all_divisors_the_largest_that_fits(precision: Precision) -> None:
    """By trying each; how the parts of a batch add up their gradients is in the plan too."""
    there = get_backend("numpy", workers=1, precision=precision)
    tiny = ModelConfig(size="tiny").architecture(257)
    totals = {n: plan_memory(config(batch=12, micro_batch=n), tiny, there).total for n in divisors(12)}
    for free in sorted(totals.values()):
        chosen, _ = decide_batch(config(batch=12, micro_batch="auto"), tiny, device(there, free, reserved=0.0), 100)
        assert chosen.training.micro_batch == max(n for n, total in totals.items() if total <= free)


def test_more_fits_where_more_is_computed_again(backend: Backend) -> None:
    there = device(backend, 400 * MB, card=True)
    batches = [decide_batch(config(batch="auto", recompute=level), A, there, WINDOWS)[0] for level in LEVELS]
    none, pointwise, block = (chosen.training.sequences for chosen in batches)
    assert none < pointwise < block


def refused(there: Backend, a: Architecture = A, **loop: Any) -> str:
    with pytest.raises(UserError) as caught:
        decide_batch(config(**loop), a, there, WINDOWS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_where_not_even_one_sequence_fits(backend: Backend) -> None:
    there = device(backend, plan(backend, 1, "block"), reserved=0.0)
    said = refused(there, batch="auto")
    assert said.startswith("not even one sequence fits ")
    assert "training.recompute block (" in said
    assert said.endswith(" would fit")
    wide = dataclasses.replace(A, context=1024)
    said = refused(device(backend, plan(backend, 1, "block", wide) - 1, reserved=0.0), wide, batch="auto")
    assert said.endswith("model.context 512 with training.recompute block, one sequence at a time, would fit")
    said = refused(device(backend, 10 * MB, reserved=0.0), batch=8, micro_batch="auto", recompute="block")
    assert said.endswith("model.size tiny with training.recompute block, one sequence at a time, would fit")
    assert refused(device(backend, 1000), batch="auto").endswith("no smaller model would fit either")
    assert "does not say how much memory is free" in refused(device(backend, None), batch="auto")


def test_a_plan_above_what_is_free(backend: Backend) -> None:
    settings = config(batch=16)
    whole = plan_memory(settings, A, backend)
    there = device(backend, whole.total - 1, reserved=0.0)
    said = memory_shortage(settings, A, there, whole)
    assert said is not None
    assert re.fullmatch(
        r"the plan takes ([\d.]+ MB), and \1 of memory are free: training\.micro_batch 8 \([\d.]+ MB\) or "
        r"training\.recompute pointwise \([\d.]+ MB\) would fit",
        said,
    )
    assert memory_shortage(settings, A, device(backend, whole.total), whole) is None
    assert memory_shortage(settings, A, device(backend, None), whole) is None


def test_out_of_memory_all_the_same(backend: Backend) -> None:
    settings = config(batch=16, recompute="pointwise")
    whole = plan_memory(settings, A, backend)
    error = MemoryError("Out of memory allocating 1,234 bytes\n(allocated so far: 0 bytes)")
    for free, there in ((None, ""), (10**12, r", 1\.0 TB were free")):
        said = out_of_memory(settings, A, device(backend, free), whole, free, error)
        assert re.fullmatch(
            rf"out of memory \(Out of memory allocating 1,234 bytes\): the plan takes [\d.]+ MB with recompute "
            rf"pointwise{there}; try training\.micro_batch 8 \([\d.]+ MB\) or training\.recompute block "
            r"\([\d.]+ MB\)",
            said,
        )
    said = out_of_memory(settings, A, device(backend, 1000), whole, 1000, MemoryError())
    assert said.startswith("out of memory: the plan takes")
    assert said.endswith("1.0 kB were free; a smaller model may fit")


# ---- how much there is


def test_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = get_backend("numpy", workers=1).memory_free()
    if there is None:
        pytest.skip("this system does not say what memory is free")
    assert 10 * MB < there < 10**14
    monkeypatch.setattr(host_memory, "_kilobytes", lambda file, name: None)  # not Linux: all there is
    everything = host_memory.available_bytes()
    assert everything is None or everything >= 10 * MB


def test_a_control_group_may_leave_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.current").write_text("300\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 120\ninactive_file 100\n", encoding="ascii")
    for limit, left in (("1000\n", 800), ("150\n", 0), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit, encoding="ascii")
        assert host_memory._left_in_group(tmp_path) == left
    assert host_memory._left_in_group(tmp_path / "none") is None
    monkeypatch.setattr(host_memory, "_left_in_group", lambda folder: 5)
    assert host_memory.available_bytes() in (5, None)
