"""A launch that a GPU would refuse or misread is one clear line, and so is a machine without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawKernel, RawModule
from cllm_gpu.simulator.build import build
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError

SOURCE = r"""
extern "C" __global__ void scale(const float* x, float* y, float factor, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = factor * x[i];
}
extern "C" __global__ void takes(double d, unsigned char c, long long big, const double* p, unsigned short* q) {}
extern "C" __global__ void big_shared(int* y) {
    extern __shared__ int s[];
    s[threadIdx.x] = 1;
    y[0] = s[0];
}
__global__ void mangled(float* y) { y[0] = 1.0f; }
"""
X = np.ones(4, np.float32)
Y = np.zeros(4, np.float32)
ONE = np.float32(1)


def _read_only() -> np.ndarray:
    array = np.zeros(4, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((X, Y, ONE), "scale takes 4 arguments (const float* x, float* y, float factor, int n), 3 given"),
        ((X, Y, 1.0, 4), "parameter factor is float, float64(1.0) given"),
        ((X, Y, 1, 4), "parameter factor is float, int64(1) given"),
        ((X, Y, ONE, 2**40), "parameter n is int, int64(1099511627776) given"),
        ((X, Y, ONE, np.int16(4)), "parameter n is int, int16(4) given"),
        ((X, Y, ONE, np.float32(4)), "parameter n is int, float32(4.0) given"),
        ((X, Y, ONE, 2**80), "passes 64 bits"),
        ((X.astype(np.float64), Y, ONE, 4), "const float* x was given an array of float64"),
        ((X, Y.astype(ml_dtypes.bfloat16), ONE, 4), "float* y was given an array of bfloat16"),
        ((X, _read_only(), ONE, 4), "the array given for float* y is read-only"),
        ((ONE, Y, ONE, 4), "const float* x is a pointer, float32(1.0) given; pass an array"),
        ((X, Y, X, 4), "parameter factor is float by value, an array given"),
        ((X, Y, ONE, "4"), "cannot pass str for int n"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        RawKernel(SOURCE, "scale")((1,), (4,), arguments)
    assert words in str(caught.value)
    assert str(caught.value).startswith("kernel scale")


@pytest.mark.parametrize("check", [False, True])
def test_right_arguments(check: bool) -> None:
    y = np.zeros(4, np.float32)
    kernel = RawKernel(SOURCE, "scale", check=check)
    for n in (4, np.int32(4), np.int64(4), np.uint32(4), np.array([4], np.int32)):
        y[:] = 0
        kernel((1,), (4,), (_read_only() + 2, y, np.float32(3), n))
        np.testing.assert_array_equal(y, 6)
    takes = RawKernel(SOURCE, "takes", check=check)
    takes((1,), (1,), (1.5, np.uint8(3), 2**40, None, np.zeros(2, np.uint16)))
    takes((1,), (1,), (1.5, 3, 7, np.uint64(0), np.zeros(0, np.int16)))


@pytest.mark.parametrize(
    ("grid", "block", "words"),
    [
        ((0,), (4,), "grid (0,): x must be from 1"),
        ((1, 65536), (4,), "grid (1, 65536): y must be from 1 to 65535"),
        ((1,), (1025,), "block (1025,): x must be from 1 to 1024"),
        ((1,), (1, 1, 65), "z must be from 1 to 64"),
        ((1,), (64, 32), "has more than 1024 threads"),
        ((1.0,), (4,), "grid must be a tuple of one to three integers"),
    ],
)
def test_wrong_sizes(grid: tuple[Any, ...], block: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        RawKernel(SOURCE, "scale")(grid, block, (X, Y, ONE, 4))
    assert words in str(caught.value)


def test_shared_memory_above_48_kilobytes_must_be_asked_for() -> None:
    kernel = RawKernel(SOURCE, "big_shared")
    y = np.zeros(1, np.int32)
    with pytest.raises(UserError, match="raise max_dynamic_shared_size_bytes first"):
        kernel((1,), (1,), (y,), shared_mem=100_000)
    kernel.max_dynamic_shared_size_bytes = 100_000
    kernel((1,), (1,), (y,), shared_mem=100_000)
    assert y[0] == 1


def test_names() -> None:
    with pytest.raises(UserError, match="no kernel 'scales'; it has: scale, takes, big_shared, mangled"):
        RawModule(code=SOURCE).get_function("scales")
    with pytest.raises(UserError, match='must be declared extern "C"'):
        RawKernel(SOURCE, "mangled")((1,), (1,), (Y,))
    with pytest.raises(UserError, match=r"either code=… or path=…"):
        RawModule()
    with pytest.raises(UserError, match="not compiled code"):
        RawModule(path="kernel.cubin")


def test_a_compile_error_is_one_line_with_the_sources_line() -> None:
    with pytest.raises(UserError) as caught:
        RawModule(code="// first line\nint f() { return missing; }\n").compile()
    assert "line 2, column 18: error: 'missing' was not declared" in str(caught.value).replace("‘", "'").replace(
        "’", "'"
    )
    assert "\n" not in str(caught.value)


def test_inline_ptx_is_explained() -> None:
    source = 'extern "C" __global__ void k(int* y) { asm("mov.u32 %0, %laneid;" : "=r"(y[0])); }'
    with pytest.raises(UserError, match="inline PTX cannot be simulated"):
        RawModule(code=source).compile()


def test_a_crash_in_unchecked_code_is_an_error() -> None:
    source = 'extern "C" __global__ void k(float* y) { y[1ll << 42] = 1.0f; }'
    with pytest.raises(KernelError) as caught:
        RawKernel(source, "k", check=False)((1,), (1,), (np.zeros(1, np.float32),))
    assert caught.value.kind == "crash"
    with pytest.raises(KernelError) as caught:
        RawKernel(source, "k", check=True)((1,), (1,), (np.zeros(1, np.float32),))
    assert caught.value.kind == "out of range"
    assert caught.value.line == 1


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("y[0] = 7 / n;", "arithmetic", "division by zero"),
        ("volatile int big[100000]; big[n] = 1; y[0] = big[n];", "crash", "local memory passes the 262144 bytes"),
    ],
)
def test_other_crashes_of_unchecked_code(body: str, kind: str, words: str) -> None:
    source = f'extern "C" __global__ void k(int* y, int n) {{ if (threadIdx.x == 1) {{ {body} }} }}'
    with pytest.raises(KernelError, match=words) as caught:
        RawKernel(source, "k", check=False)((1,), (2,), (np.zeros(1, np.int32), 0))
    assert caught.value.kind == kind
    assert caught.value.thread == (1, 0, 0)


def test_the_environment_turns_the_checker_on(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = RawKernel(SOURCE, "scale")
    y = np.zeros(8, np.float32)[:4]
    monkeypatch.setenv("CLLM_SIMULATOR_CHECK", "0")
    kernel((1,), (8,), (np.zeros(8, np.float32), y, ONE, 5))
    monkeypatch.setenv("CLLM_SIMULATOR_CHECK", "1")
    with pytest.raises(KernelError, match="out of range: writes 4 bytes at byte 16 of y, which has 16 bytes"):
        kernel((1,), (8,), (np.zeros(8, np.float32), y, ONE, 5))


def test_a_changed_header_is_compiled_again(tmp_path: Path) -> None:
    source = '#include "constant.cuh"\nextern "C" __global__ void k(int* y) { y[0] = VALUE; }'
    libraries = []
    for value in (3, 4, 3):
        (tmp_path / "constant.cuh").write_text(f"#define VALUE {value}\n")
        libraries.append(build(source, (f"-I{tmp_path}",), (), False).library)
    assert libraries[0] != libraries[1]
    assert libraries[0] == libraries[2]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    find_compiler.cache_clear()
    yield
    find_compiler.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_there_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        RawModule(code=SOURCE + "// never compiled before\n").compile()
    assert str(caught.value).startswith("no C++ compiler found: install g++ or clang++")
