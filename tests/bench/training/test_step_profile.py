"""The kernels of a step by class: every kernel has one, the work is the fact sheet's, times are summed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu_check.launch_all import CountingLauncher, all_kernels
from bench.gpu_check.subprocesses import Finished, run_program
from bench.kernels.cases import SMALL, BoundCase
from bench.kernels.operation_cases import NAMES, cuda_side, make_case
from bench.training import gpt2_process, gpt2_training, step_profile
from bench.training.kernel_times import STEP, WARMUP_STEPS, Clock, KernelTimes
from bench.training.roofline import (
    ATTENTION,
    BIASES,
    CLASS_OF,
    CLASSES,
    EMBEDDING,
    FINISHES,
    GELU_BACKWARD,
    NORM_BACKWARD,
    OPTIMIZER,
    PRODUCTS,
    Measured,
    classes_of,
    largest_gaps,
    step_work,
)
from cllm_gpu.backend import Backend
from cllm_gpu.ops.registry import cuda_operations, operations_on
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.profiling import MATMUL, Ranges
from tests.bench.fakes import Clock as Seconds
from tests.bench.gpu_check.test_launch_all import NoKernels
from tests.bench.training.test_roofline import BATCH, COPY, GEMM, GPT2, doubled_rows
from tests.gpu.training_runs import Run, tiny_architecture
from tests.ops.cuda.devices import simulator_or_skip
from tests.ops.cuda.lt_stand_in import StandIn, launcher_with

# ---- classes


def test_every_kernel_has_one_class() -> None:
    kernels = {kernel for _, kernel in all_kernels()}
    assert set(CLASS_OF) - {MATMUL} | FINISHES == kernels
    assert not set(CLASS_OF) & FINISHES
    assert set(CLASS_OF.values()) == set(CLASSES)


EXPECTED = {
    "layernorm_backward": {NORM_BACKWARD: 3},
    "linear_backward": {PRODUCTS: 2, BIASES: 2},
    "mlp_backward": {PRODUCTS: 4, BIASES: 2, GELU_BACKWARD: 2},
    "attention_backward": {ATTENTION: 3},
    "adam_step": {OPTIMIZER: 2},
    "squared_norm": {EMBEDDING: 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_of_its_classes_and_no_launch_is_counted_twice(name: str) -> None:
    """As the launcher itself counts launches; matrix products are no launches of ours."""
    clock, ranges = Ticks(), Ranges()
    launcher = CountingLauncher(np, NoKernels)
    launcher.watched = ranges.kernel
    ranges.watch = times = KernelTimes(clock, host=clock.seconds)
    case = make_case(name, "bfloat16", SMALL)
    bound = BoundCase(case, cuda_side(case, launcher), np.copy)
    with np.errstate(all="ignore"):
        for _ in range(WARMUP_STEPS + 1):
            launcher.launches.clear()
            with ranges(STEP), ranges(f"operation/{name}"):
                bound.call()
    found = {kind: seen.launches for kind, seen in times.by_class().items()}
    products = found.get(PRODUCTS, 0)
    assert sum(found.values()) == launcher.launches.total() + products
    if name in EXPECTED:
        assert found == EXPECTED[name]
    if name != "attention_weights":  # NumPy's, for inspection: no step has it
        assert found


def test_the_operations_are_all_there() -> None:
    assert set(operations_on("cuda")) <= set(NAMES)


def test_a_sums_end_is_of_the_class_of_its_beginning() -> None:
    launches = ["layernorm_backward", "column_sum_finish", "column_sum_finish", "column_sum_partial"]
    assert classes_of([*launches, "column_sum_finish"]) == [NORM_BACKWARD] * 3 + [BIASES] * 2
    with pytest.raises(KeyError, match="unheard_of"):
        classes_of(["unheard_of"])


# ---- times


class Ticks(Clock):
    """A clock that a test sets; `held` keeps what the card was held for."""

    def __init__(self) -> None:
        self.seconds = Seconds()
        self.held: list[float] = []

    def mark(self) -> float:
        return self.seconds.now

    def delay(self, seconds: float) -> None:
        self.held.append(seconds)
        self.seconds.now += seconds

    def milliseconds(self, start: float, stop: float) -> float:
        return 1e3 * (stop - start)


def _step(ranges: Ranges, clock: Ticks, *, matmul: float, gap: float = 0.0) -> None:
    with ranges(STEP), ranges("forward"):
        for kernel, seconds in (("matmul", matmul), ("gelu_backward", 0.25), ("column_sum_finish", 0.5)):
            with ranges.kernel(kernel):
                clock.seconds.now += seconds
            clock.seconds.now += gap


def test_times_are_medians_over_the_steps_before_which_the_card_was_held() -> None:
    clock, ranges = Ticks(), Ranges()
    ranges.watch = times = KernelTimes(clock, host=clock.seconds)
    for matmul in (100.0, 50.0, 1.0, 2.0, 6.0):
        _step(ranges, clock, matmul=matmul, gap=0.125)
    seen = times.by_class()
    assert seen == {PRODUCTS: Measured(1, 2000.0), GELU_BACKWARD: Measured(2, 750.0)}
    assert times.whole_step() == 2000.0 + 2 * 125.0 + 750.0, "what held the card is no part of a step"
    first = 50.0 + 0.75 + 3 * 0.125
    assert clock.held[0] == 1.5 * first + 1e-4
    assert len(clock.held) == 3
    assert max(clock.held) == clock.held[0], "not the longer for the time it held the card itself"


def test_what_is_launched_outside_of_a_step_is_not_watched() -> None:
    clock, ranges = Ticks(), Ranges()
    ranges.watch = times = KernelTimes(clock, host=clock.seconds)
    for _ in range(WARMUP_STEPS + 1):
        with ranges.kernel("matmul"):
            clock.seconds.now += 5.0
        _step(ranges, clock, matmul=1.0)
        with ranges("evaluation"), ranges.kernel("matmul"):
            clock.seconds.now += 5.0
    seen = times.by_class()[PRODUCTS]
    assert (seen.launches, seen.milliseconds) == (1, pytest.approx(1000.0))


def test_a_launch_within_a_launch_is_refused() -> None:
    ranges = Ranges()
    ranges.watch = KernelTimes(Ticks())
    with ranges(STEP), ranges.kernel("matmul"), pytest.raises(RuntimeError, match="counted twice"):
        ranges.kernel("gelu_forward").__enter__()


def test_a_launch_that_fails_is_not_counted_and_leaves_the_watch_as_it_was() -> None:
    clock, ranges = Ticks(), Ranges()
    ranges.watch = times = KernelTimes(clock, host=clock.seconds)
    for _ in range(WARMUP_STEPS + 1):
        with ranges(STEP):
            with pytest.raises(OSError, match="no"), ranges.kernel("matmul"):
                raise OSError("no")
            with ranges.kernel("matmul"):
                clock.seconds.now += 1.0
    assert times.by_class() == {PRODUCTS: Measured(1, 1000.0)}


def test_nobody_watching_there_are_no_ranges_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cllm_gpu.utils.profiling._nvtx_domain", lambda: None)
    ranges = Ranges()
    assert ranges.kernel("matmul") is ranges.kernel("gelu_forward") is ranges("forward")


# ---- rehearsals


@pytest.mark.skipif(find_compiler() is None, reason="the simulator needs a C++ compiler")
def test_a_rehearsed_step_launches_what_was_counted_and_has_no_times() -> None:
    found = step_profile.profile("124M", 2, rehearse=True)
    assert found["note"] == ""
    assert {row["class"]: row["launches"] for row in found["rows"]} == {
        row["class"]: row["launches_counted"] for row in found["rows"]
    }
    assert {row["class"] for row in found["rows"]} == set(step_work(GPT2, BATCH, fused=False))
    assert all(row["milliseconds"] is None for row in found["rows"])
    text = step_profile.profile_text(found)
    assert text.startswith("124M, B=2, by class of kernel:\n")
    assert text.endswith("no gaps: nothing was timed")


def test_with_epilogues_a_step_launches_what_was_counted() -> None:
    """Through the stand-in of cuBLASLt; without the two of a device's step, which this run has none of."""
    ranges = Ranges()
    launcher = launcher_with(StandIn(), kernels=simulator_or_skip(), watched=ranges.kernel)
    backend = Backend("simulator", np, cuda_operations(launcher, ranges), "with epilogues", precision="bf16")
    architecture = tiny_architecture(layers=2)
    run, clock = Run(backend, architecture), Clock()
    ranges.watch = times = KernelTimes(clock)
    for _ in range(WARMUP_STEPS + 1):
        with ranges(STEP):
            run.step()
    counted = {name: part.launches for name, part in step_work(architecture, 4, fused=True).items()}
    counted[EMBEDDING] -= 2
    assert {name: seen.launches for name, seen in times.by_class().items()} == counted


@pytest.mark.skipif(find_compiler() is None, reason="the simulator needs a C++ compiler")
def test_a_process_of_its_own_gives_the_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rehearsed(command: list[str], seconds: float, log: Path) -> Finished:
        return run_program([*command, "--rehearse"], seconds, tmp_path / log.name)

    monkeypatch.setattr(gpt2_training, "run_program", rehearsed)
    found = gpt2_training.measure_profile("124M", 2, 300.0)
    assert found["note"] == ""
    assert len(found["rows"]) == len(step_work(GPT2, BATCH, fused=False))


def test_a_profile_without_memory_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    error = type("OutOfMemoryError", (Exception,), {})

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error("x")

    monkeypatch.setattr(step_profile, "kernel_times", fail)
    found = step_profile.profile("124M", 4, rehearse=True)
    assert found == step_profile.empty_profile("124M", 4, gpt2_process.OUT_OF_MEMORY)
    assert step_profile.profile_text(found) == "124M, B=4, by class of kernel: out of memory"
    error = ValueError
    with pytest.raises(ValueError, match="x"):
        step_profile.profile("124M", 4, rehearse=True)


def test_what_is_printed_of_a_profile() -> None:
    rows = doubled_rows()
    found = step_profile.empty_profile("124M", 64) | {
        "rows": rows, "gaps": largest_gaps(rows), "ceilings": {"copy_terabytes": COPY, "gemm_teraflops": GEMM},
        "whole_milliseconds": 700.0, "step_milliseconds": 131.5,
    }  # fmt: skip
    lines = step_profile.profile_text(found).splitlines()
    assert lines[-4:] == [
        "the largest gaps to the least: matrix products 61.5 ms, attention 5.5 ms",
        f"a step launched kernel by kernel, with events: 700.00 ms, of it {sum(r['milliseconds'] for r in rows):.2f} "
        "in kernels",
        "a step as timed in the comparison with PyTorch, without events: 131.50 ms",
        "a copy: 4.30 TB/s; a product: 790 TFLOP/s",
    ]
