"""Fixtures every folder of tests shares; which tests run says selection.py."""

from __future__ import annotations

import contextlib
import importlib
import signal
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters, Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.utils.compiler import find_compiler

Array = np.ndarray[Any, Any]
FIVE_POINT_STEP = 2.5e-4

pytest_plugins = ["tests.selection"]


@pytest.fixture(scope="session", autouse=True)
def _control_c_is_heard() -> None:
    """A process that a shell started in the background ignores SIGINT; tests press it, here and in their children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Matrix products of one thread: the matrices here are small, and tests may run side by side."""
    with contextlib.ExitStack() as limits:
        with contextlib.suppress(ImportError):  # a bare image with a GPU may not have it
            limits.enter_context(importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas"))
        yield


@pytest.fixture(scope="session")
def backend() -> Backend:
    """The reference operations on NumPy, one worker."""
    return get_backend("numpy", workers=1)


@pytest.fixture(scope="session", params=["numpy", "simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def every_backend(request: pytest.FixtureRequest) -> Backend:
    """The reference, the CUDA kernels on the simulator (not run without a C++ compiler) and on a GPU."""
    if request.param == "simulator" and find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    return get_backend(request.param, workers=1)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> np.random.Generator:
    """A random generator seeded by the test's own name: tests do not depend on their order."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture
def within() -> Callable[[str, float, float], None]:
    """within(what, error, bound): prints the measured error beside its bound and fails above it, or on NaN."""

    def check(what: str, error: float, bound: float) -> None:
        print(f"{what}: error {error:.2e}, bound {bound:.2e}")
        if not (error <= bound):
            pytest.fail(f"{what}: error {error:.3e} is above {bound:.3e}")

    return check


@pytest.fixture
def gradient_error(generator: np.random.Generator) -> Callable[..., float]:
    """gradient_error(f, x, dx): relative error of the derivative dx of f() by x, float64, along random directions.

    f reads x, which is moved in place and put back. The direction is half random, half the gradient itself, so that
    the derivative is not small by chance. The five-point difference with h = 2.5e-4 along a unit vector is wrong by
    h⁴·f⁽⁵⁾/30 = 1e-16·f⁽⁵⁾ and by a few eps·|f|/h = 1e-12·|f|. A layer norm of a few numbers of deviation 0.1 has
    f⁽⁵⁾ near 1e5, so both stay well below 1e-7. A derivative under 1e-3·|f| is measured against that, since
    differences cannot resolve it to 1e-7.
    """

    def error(f: Callable[[], float], x: Array, dx: Array, *, directions: int = 2) -> float:
        assert x.dtype == np.float64
        return max(_directional_error(f, x, dx, generator) for _ in range(directions))

    return error


def _directional_error(f: Callable[[], float], x: Array, dx: Array, generator: np.random.Generator) -> float:
    direction = generator.standard_normal(x.shape)
    direction /= np.linalg.norm(direction)
    steepest = np.linalg.norm(dx)
    if steepest > 0:
        direction *= 1.0 if np.sum(direction * dx) >= 0 else -1.0  # never against the gradient: the sum is not zero
        direction += dx / steepest
        direction /= np.linalg.norm(direction)
    start, values = x.copy(), {}
    for multiple in (-2, -1, 0, 1, 2):
        x[...] = start + (multiple * FIVE_POINT_STEP) * direction
        values[multiple] = f()
    x[...] = start
    numeric = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * FIVE_POINT_STEP)
    analytic = float(np.sum(dx * direction))
    if numeric == analytic:  # also where both are zero, as with a vocabulary of one
        return 0.0
    return abs(numeric - analytic) / max(abs(numeric), abs(analytic), 1e-3 * abs(values[0]))


@pytest.fixture
def build_model(backend: Backend) -> Callable[..., tuple[Transformer, FlatParameters]]:
    """build_model(architecture, dtype): a model and a gradient buffer; the weights are far from their start.

    At GPT-2's start attention is almost uniform and every bias is zero, which hides errors: a normal of deviation
    `spread` is added to every parameter.
    """

    def build(
        architecture: Architecture, dtype: Any = np.float64, *, seed: int = 1, spread: float = 0.2
    ) -> tuple[Transformer, FlatParameters]:
        layout = Layout(parameter_specs(architecture), dtype)
        parameters = layout.views(initial_values(layout, seed))
        generator = np.random.default_rng(seed)
        for view in parameters.values():
            view += (spread * generator.standard_normal(view.shape)).astype(dtype)
        gradients = layout.views(backend.zeros(layout.size, dtype))
        return Transformer(architecture, backend, parameters), gradients

    return build
