"""Kernels that do not end, or that would end the process: the launch ends instead, with the place in the kernel."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawKernel, settings
from cllm_gpu.utils.errors import UserError

Array = np.ndarray[Any, Any]
INCLUDES = "#include <cassert>\n#include <cstdlib>\n#include <unistd.h>\n"


def kernel(body: str, check: bool) -> RawKernel:
    source = f'extern "C" __global__ void k(int* y) {{\n{body}\n}}'
    return RawKernel(INCLUDES + source, "k", check=check)


def run(body: str, check: bool = False, threads: int = 64) -> Array:
    y = np.zeros(8, np.int32)
    kernel(body, check)((1,), (threads,), (y,))
    return y


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("body", ["volatile int* v = y;\nwhile (v[1] == 0) {}", "for (;;)\n__syncthreads();"])
def test_a_launch_has_a_time_limit(body: str, check: bool) -> None:
    with settings(seconds=0.2), pytest.raises(KernelError, match=r"more than 0\.2 s of processor time") as caught:
        run(body, check)
    assert caught.value.kind == "time limit"
    assert caught.value.line in (5, 6)


def test_a_launch_of_many_blocks_has_a_time_limit() -> None:
    with settings(seconds=0.2), pytest.raises(KernelError, match="time limit"):
        kernel("y[0] = 1;", False)((2**31 - 1,), (1,), (np.zeros(8, np.int32),))


def test_the_environment_sets_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_SIMULATOR_SECONDS", "0.2")
    with pytest.raises(KernelError, match="time limit"):
        run("for (;;)\n__syncthreads();")
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("CLLM_SIMULATOR_SECONDS", wrong)
        with pytest.raises(UserError, match=f"CLLM_SIMULATOR_SECONDS is '{wrong}'"):
            run("y[0] = 1;")


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("body", ["for (;;) y[1 + threadIdx.x % 2] = 1;", "for (;;) __syncthreads();"])
def test_ctrl_c_interrupts_a_launch(body: str, check: bool) -> None:
    kernel(body, check).compile()
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(body, check, threads=2)
    assert time.monotonic() - sent[0] < 1.0
    np.testing.assert_array_equal(run("y[threadIdx.x] = 3;", check, threads=8), 3)  # and the next launch is sound


def test_a_signal_with_a_handler_of_its_own_does_not_end_a_launch() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        start = time.monotonic()
        y = np.zeros(8, np.int32)
        spin = kernel(
            "volatile int* v = y;\nfor (long long i = 0; v[2] == 0 && i < 400000000; ++i) {}\ny[1] = 9;", False
        )
        spin((1,), (1,), (y,))
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert y[1] == 9
    assert seen == [signal.SIGINT]
    assert time.monotonic() - start > 0.2


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("abort();", r"the kernel calls abort\(\)"),
        ("std::abort();", r"the kernel calls abort\(\)"),
        ("exit(3);", r"the kernel calls exit\(\)"),
        ("std::exit(3);", r"the kernel calls exit\(\)"),
        ("_exit(3);", r"the kernel calls _exit\(\)"),
        ("quick_exit(3);", r"the kernel calls quick_exit\(\)"),
        ("assert(y == nullptr);", "assertion failed: y == nullptr"),
        ("__trap();", r"__trap\(\) was called"),
        ("__builtin_trap();", r"__builtin_trap\(\)"),
    ],
)
def test_the_end_of_the_process_is_the_end_of_the_launch(body: str, words: str, check: bool) -> None:
    with pytest.raises(KernelError, match=f"kernel k, line 6.*block .*thread .3, 0, 0.*{words}") as caught:
        run(f"if (threadIdx.x == 3)\n{body}", check)
    assert (caught.value.kind, caught.value.line, caught.value.thread) == ("trap", 6, (3, 0, 0))


def test_an_exception_in_a_kernel_is_a_trap() -> None:
    with pytest.raises(KernelError, match="throws an exception"):
        run("if (threadIdx.x == 3)\nthrow 3;")


@pytest.mark.parametrize(
    "body",
    [
        "volatile int* v = y; if (threadIdx.x == 0) { while (v[0] == 0) {} y[1] = 7; }"
        "else if (threadIdx.x == T) v[0] = 1;",
        "__shared__ volatile int f; if (threadIdx.x == 0) f = 0; __syncthreads();"
        "if (threadIdx.x == 0) { while (f == 0) {} y[1] = 7; } else if (threadIdx.x == T) f = 1;",
        "if (threadIdx.x == 0) { while (atomicAdd(y, 0) == 0) {} y[1] = 7; }"
        "else if (threadIdx.x == T) atomicExch(y, 1);",
        "if (threadIdx.x == 0) { while (atomicAdd(y, 0) == 0) __nanosleep(9); y[1] = 7; }"
        "else if (threadIdx.x == T) atomicExch(y, 1);",
    ],
)
@pytest.mark.parametrize("writer", [1, 63])
def test_a_thread_that_spins_on_another_of_its_block_makes_progress(body: str, writer: int) -> None:
    with settings(seconds=5):
        assert run(f"const int T = {writer};\n{body}")[1] == 7


def test_threads_that_take_turns_at_a_volatile_counter() -> None:
    body = """volatile int* turn = y;
for (int round = 0; round < 10; ++round) {
    while (turn[0] != round * 64 + int(threadIdx.x)) {}
    turn[1] = turn[1] + threadIdx.x;
    turn[0] = turn[0] + 1;
}"""
    with settings(seconds=20):
        y = run(body)
    assert (y[0], y[1]) == (640, 10 * sum(range(64)))
