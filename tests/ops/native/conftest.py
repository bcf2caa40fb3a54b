"""The native library, and how an operation of it is compared with the reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.native import blas
from cllm_gpu.ops.native.library import Library, load_library
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.ops.registry import OPERATIONS, implementation
from cllm_gpu.utils.compiler import find_compiler

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="session", params=["own", "mkl"])
def library(request: pytest.FixtureRequest) -> Library:
    """The compiled library, with its own matrix products and with MKL's where that is installed."""
    if find_compiler() is None:
        _missing("no C++ compiler: the native operations are not tested")
    if request.param == "mkl" and blas.load_mkl() is None:
        pytest.skip("the extra `mkl` is not installed: the native operations are not tested with it")
    return load_library(use_mkl=request.param == "mkl")


def _missing(reason: str) -> None:
    if os.environ.get("CLLM_REQUIRE_NATIVE") == "1":
        pytest.fail(f"CLLM_REQUIRE_NATIVE is 1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def agree(library: Library, within: Callable[[str, float, float], None]) -> Callable[..., None]:
    """agree(operation, arrays, terms=n, lattice=…, **settings): the native operation against the reference.

    `arrays` are float64 (or integers, or None). The reference gets them in float64, the native operation in float64
    and in float32; every array is compared afterwards, and the results where they are numbers. The bound is
    8·eps·n relative to the largest element: each of the at most n roundings on the way to an element is wrong by
    eps/2, with as much again for the elements they start from, for the reference and for the exponential's 2 ulp.
    """

    def run(function: Any, first: Any, arrays: list[Any], dtype: Any, settings: Any) -> list[Any]:
        own = [_convert(x, dtype) for x in arrays]
        given = {key: convert_score_bias(value, dtype) for key, value in settings.items()}
        result = function(first, *own, **given)
        gradients = given.get("dscore_bias") or ScoreBiasGradients(None, None)
        return [*own, gradients.scalars, gradients.points, None if result is None else np.float64(result)]

    def check(name: str, arrays: list[Any], *, terms: int, lattice: Any = None, **settings: Any) -> None:
        settings = settings | (lattice or {})
        for dtype in (np.float64, np.float32):
            start = [x if x is None or x.dtype.kind == "i" else x.astype(dtype).astype(np.float64) for x in arrays]
            rounded = {key: convert_score_bias(value, dtype, np.float64) for key, value in settings.items()}
            expected = run(OPERATIONS[name].reference, np, start, np.float64, rounded)
            measured = run(implementation(name, "native"), library, start, dtype, rounded)
            for index, (want, have) in enumerate(zip(expected, measured, strict=True)):
                if want is not None and np.asarray(want).dtype.kind == "f":
                    bound = 8 * float(np.finfo(dtype).eps) * terms
                    within(f"{name} array {index} {np.dtype(dtype)}", relative_error(have, want), bound)

    return check


def convert_score_bias(value: Any, *dtypes: Any) -> Any:
    """Score terms, their gradients or a symmetry, its arrays rounded to each dtype in turn; else value itself."""
    if not isinstance(value, ScoreBias | ScoreBiasGradients | Symmetry):
        return value
    arrays = {}
    for name in ("turns",) if isinstance(value, Symmetry) else ("points", "scalars"):
        arrays[name] = getattr(value, name)
        for dtype in dtypes:
            arrays[name] = _convert(arrays[name], dtype)
    return dataclasses.replace(value, **arrays)


def _convert(x: Any, dtype: Any) -> Any:
    """A copy in this dtype with the same strides (in elements): views into wider arrays stay such views."""
    if x is None or x.dtype.kind == "i":
        return x
    if x.flags.c_contiguous:
        return x.astype(dtype)
    whole = x.base.astype(dtype)
    offset = (x.__array_interface__["data"][0] - x.base.__array_interface__["data"][0]) // x.itemsize
    strides = tuple(stride // x.itemsize * whole.itemsize for stride in x.strides)
    view = np.ndarray(x.shape, dtype, whole, offset * whole.itemsize, strides)
    view[...] = x
    return view


def relative_error(have: Any, want: Any) -> float:
    """Largest difference, relative to the largest number wanted; NaN when either holds one."""
    scale = float(np.max(np.abs(want), initial=0.0)) or 1.0
    return float(np.max(np.abs(np.asarray(have, np.float64) - want), initial=0.0)) / scale
