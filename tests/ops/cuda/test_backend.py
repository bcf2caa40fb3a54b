"""The backends that run CUDA kernels: what they are, and what they say when they are not available."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.ops.cuda.kernel_source import kernel_parameters, load_source, source_directory
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.registry import OPERATIONS
from cllm_gpu.utils import compiler
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.devices import simulator_or_skip


def test_the_simulator_is_a_backend() -> None:
    simulator_or_skip()
    backend = get_backend("simulator")
    assert (backend.name, backend.xp, backend.workers) == ("simulator", np, 1)
    assert all(callable(getattr(backend.ops, name)) for name in OPERATIONS)


def test_the_simulator_without_a_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with pytest.raises(UserError, match=r"^no C\+\+ compiler found: install g\+\+ or clang\+\+") as caught:
        get_backend("simulator")
    assert "\n" not in str(caught.value)


def test_each_operation_is_a_range_of_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    simulator_or_skip()
    backend = get_backend("simulator")
    seen: list[str] = []
    original = type(backend.ranges).__call__
    monkeypatch.setattr(type(backend.ranges), "__call__", lambda self, name: seen.append(name) or original(self, name))
    backend.ops.squared_norm(np.ones(4, np.float32))
    assert seen == ["operation/squared_norm"]


def test_includes_are_spliced_once_and_lines_keep_their_numbers() -> None:
    """A compiler's cache hashes the text it is given, so the headers must be in it."""
    text = load_source("attention.cu")
    assert '#include "' not in text
    tiles = ("attention_tiles_float32.cuh", "attention_tiles_bfloat16.cuh")
    own = ("attention_float32.cuh", "attention_bfloat16.cuh")
    for header in ("common.cuh", "storage.cuh", "attention.cuh", *tiles, *own):
        assert text.count(f'#line 1 "{header}"') == 1
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.endswith('"attention.cu"'))
    number = int(lines[start].split()[1])
    original = (source_directory() / "attention.cu").read_text(encoding="utf-8").splitlines()
    assert lines[start + 1 : start + 4] == original[number - 1 : number + 2]


def test_parameters_are_read_from_the_source() -> None:
    parameters = {p.name: p for p in kernel_parameters("adam.cu")["adam_step"].fields}
    assert list(parameters)[:3] == ["parameters", "gradients", "first_moment"]
    assert (parameters["gradients"].type, parameters["gradients"].pointer) == ("gradient", True)
    assert (parameters["clip"].constant, parameters["moved"].constant) == (True, False)
    assert (parameters["size"].type, parameters["size"].pointer) == ("long long", False)


def test_outgrown_scratch_is_kept() -> None:
    """A captured graph goes on writing where it did when it was captured."""
    launcher = Launcher(np, None)
    small = launcher.scratch("sums", (4,), "float32")
    alive = weakref.ref(small.base if small.base is not None else small)
    del small
    assert launcher.scratch("sums", (9,), "float32").shape == (9,)
    gc.collect()
    assert alive() is not None


def test_numbers_on_the_device() -> None:
    launcher, there = Launcher(np, None), np.ones(2, np.float32)
    assert launcher.on_device("x", there, "float32") is there
    assert launcher.on_device("x", (0.5, 2.0), "float32").tolist() == [0.5, 2.0]
    assert launcher.on_device("x", 2**32 - 1, "uint32").tolist() == [2**32 - 1]
