"""What the sanitizers watch launches every kernel there is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from bench.gpu_check import launch_all, precompile
from cllm_gpu.ops.cuda.kernel_source import kernel_parameters
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.cuda.variants import all_variants


class NoKernels:
    """A RawModule whose kernels do nothing, and which keeps what it was asked to compile."""

    compiled: list[tuple[str, tuple[str, ...]]] = []  # noqa: RUF012 (of the class, as RawModule is one)

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        self.key = code, options

    def compile(self) -> None:
        NoKernels.compiled.append(self.key)

    def get_function(self, name: str) -> Any:
        function: Any = lambda grid, block, arguments, shared_mem: None  # noqa: E731
        return _Kernel(function)


class _Kernel:
    def __init__(self, function: Any) -> None:
        self.function, self.max_dynamic_shared_size_bytes = function, 0

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.function(*arguments, **options)


@pytest.fixture
def launched() -> tuple[launch_all.CountingLauncher, set[Variant]]:
    """A launcher over kernels that do nothing, after the exercise, and the variants it compiled."""
    launcher = launch_all.CountingLauncher(np, NoKernels)
    with np.errstate(all="ignore"):
        for _ in launch_all.exercise(launcher, np.copy, quick=False):
            pass
    return launcher, {variant for variant, _ in launcher._kernels}


def test_every_kernel_is_launched_in_both_dtypes(launched: Any) -> None:
    launcher, variants = launched
    assert set(launcher.launches) == launch_all.all_kernels()
    for source in {source for source, _ in launch_all.all_kernels()}:
        assert {v.storage for v in variants if v.source == source} == {"float32", "bfloat16"}
    for source in ("attention.cu", "attention_fused.cu", "layernorm.cu"):
        assert set(kernel_parameters(source)) == {name for s, name in launcher.launches if s == source}


def test_every_attention_variant_is_launched(launched: Any) -> None:
    _, variants = launched
    wanted = {v for v in all_variants() if v.source.startswith("attention")}
    assert {v.source for v in wanted} == {"attention.cu", "attention_fused.cu"}
    assert wanted <= variants


def test_a_kernel_that_is_left_out_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        launch_all, "_launcher", lambda device: (launch_all.CountingLauncher(np, NoKernels), np.copy, np.asarray)
    )
    monkeypatch.setattr(launch_all, "exercise", lambda *arguments, **options: [("x", {"value": 1.0})])
    assert launch_all.run("simulator", quick=True) == 1
    assert "never launched: adam_step in adam.cu" in capsys.readouterr().out


def test_a_result_that_is_not_a_number_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        launch_all, "_launcher", lambda device: (launch_all.CountingLauncher(np, NoKernels), np.copy, np.asarray)
    )
    monkeypatch.setattr(launch_all, "all_kernels", set)
    monkeypatch.setattr(
        launch_all, "exercise", lambda *arguments, **options: [("gelu", {"out": np.array([1.0, np.nan])})]
    )
    assert launch_all.run("simulator", quick=True) == 1
    assert "not a number: gelu: out" in capsys.readouterr().out


def test_compiling_ahead_asks_for_what_the_launcher_asks_for(launched: Any) -> None:
    """Same source text and same options: CuPy's cache on disk is found again."""
    NoKernels.compiled.clear()
    variants = precompile.variants_of_the_check()
    with ThreadPoolExecutor(2) as pool:
        taken = precompile.compile_all(pool, variants, NoKernels)
    assert [variant for _, variant in taken] == variants
    from cllm_gpu.ops.cuda.kernel_source import load_source

    ahead = set(NoKernels.compiled)
    assert {(load_source(v.source), v.options) for v in launched[1]} <= ahead
