"""Without a C++ compiler there is no simulator: its tests are then reported as not run, never as passed."""

from __future__ import annotations

import os

import pytest

from cllm_gpu.utils.compiler import find_compiler

HAVE_COMPILER = find_compiler() is not None


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if not HAVE_COMPILER and os.environ.get("CLLM_REQUIRE_COMPILER") == "1":
        pytest.fail("CLLM_REQUIRE_COMPILER=1, and there is no C++ compiler")
    if not HAVE_COMPILER:
        pytest.skip("not run: the simulator needs a C++ compiler (g++ or clang++)")
