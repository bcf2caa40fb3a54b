"""A struct that a kernel takes by value, and what its pointers point to."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawKernel
from cllm_gpu.simulator.errors import CaptureError
from cllm_gpu.simulator.graphs import capture, empty
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.struct_argument import Pointer, StructArgument

SOURCE = r"""
struct Params {
    float factor;
    const float* x;
    float* y;
    int n;
};
extern "C" __global__ void scale(const __grid_constant__ Params params, int first) {
    const int i = threadIdx.x + first;
    if (i < params.n) params.y[i] = params.factor * (params.x == nullptr ? 1.0f : params.x[i]);
}
"""
LAYOUT = "@fPPi0P"


def _params(x: Any, y: Any, n: int) -> StructArgument:
    packed = struct.pack(LAYOUT, 3.0, 0 if x is None else x.ctypes.data, y.ctypes.data, n)
    pointers = [Pointer("params.x", 8, x), Pointer("params.y", 16, y)]
    return StructArgument.of(packed, pointers if x is not None else pointers[1:])


@pytest.mark.parametrize("check", [False, True])
def test_a_struct_is_passed_by_value(check: bool) -> None:
    x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    kernel = RawKernel(SOURCE, "scale", check=check)
    kernel((1,), (8,), (_params(x, y, 4), 0))
    assert y.tolist() == [0, 3, 6, 9]
    kernel((1,), (8,), (_params(None, y, 4), 1))
    assert y.tolist() == [0, 3, 3, 3]


def test_an_array_of_one_element_is_a_struct_as_in_cupy() -> None:
    x, y = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    dtype = np.dtype([("factor", "f4"), ("x", "u8"), ("y", "u8"), ("n", "i4")], align=True)
    params = np.array((2.0, x.ctypes.data, y.ctypes.data, 4), dtype)
    RawKernel(SOURCE, "scale", check=False)((1,), (4,), (params, 0))
    assert y.tolist() == [0, 2, 4, 6]


def test_an_access_outside_names_the_structs_array() -> None:
    x, y = np.zeros(4, np.float32), np.zeros(3, np.float32)
    with pytest.raises(KernelError, match=r"writes 4 bytes at byte 12 of params.y, which has 12 bytes"):
        RawKernel(SOURCE, "scale", check=True)((1,), (8,), (_params(x, y, 4), 0))
    with pytest.raises(KernelError, match=r"reads 4 bytes at byte 16 of params.x, which has 16 bytes"):
        RawKernel(SOURCE, "scale", check=True)((1,), (8,), (_params(x, np.zeros(8, np.float32), 5), 0))


def test_views_of_one_array_in_a_struct_share_their_copy() -> None:
    whole = np.arange(8, dtype=np.float32)
    RawKernel(SOURCE, "scale", check=True)((1,), (8,), (_params(whole[:6], whole[2:], 4), 3))
    assert whole.tolist() == [0, 1, 2, 3, 4, 9, 6, 7]


def test_a_struct_of_another_size_or_elsewhere_is_an_error() -> None:
    y = np.zeros(4, np.float32)
    with pytest.raises(UserError, match=r"^kernel scale: a struct of 8 bytes given for 32-byte struct params$"):
        RawKernel(SOURCE, "scale")((1,), (4,), (StructArgument.of(bytes(8), ()), 0))
    with pytest.raises(UserError, match=r"^kernel scale: a struct of 32 bytes given for int first$"):
        RawKernel(SOURCE, "scale")((1,), (4,), (_params(None, y, 4), _params(None, y, 4)))


def test_a_capture_looks_into_structs() -> None:
    kernel, x, y = RawKernel(SOURCE, "scale"), empty(4, np.float32), empty(4, np.float32)
    x[...] = 2.0
    graph = capture(lambda: kernel((1,), (4,), (_params(x, y, 4), 0)))
    x[...] = 5.0
    graph.launch()
    assert y.tolist() == [15] * 4
    with pytest.raises(CaptureError, match="gives kernel scale an array of shape"):
        capture(lambda: kernel((1,), (4,), (_params(np.zeros(4, np.float32), y, 4), 0)))
