"""NVIDIA's compiler takes every kernel for every architecture, and needs no more than the committed report says."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from bench.compiled import kernel_resources, nvrtc
from cllm_gpu.ops.cuda.kernel_source import kernel_parameters, load_source, source_directory
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.cuda.variants import all_variants
from cllm_gpu.utils.errors import UserError
from tests.ops.cuda.params_layout import SOURCES_WITH_STRUCTS, with_layout_asserted

MOST_REGISTERS = 255
QUICK_ARCHITECTURE = "sm_90"

MISSING = nvrtc.load_nvrtc() is None and os.environ.get("CLLM_REQUIRE_NVRTC") != "1"
pytestmark = pytest.mark.skipif(MISSING, reason="not run: NVRTC is not installed (extra `test`)")


@pytest.fixture(scope="module")
def most() -> Any:
    """Source → kernel → registers, shared bytes, spilled bytes: the most that the committed report allows."""
    return json.loads(kernel_resources.RESULT.read_text(encoding="utf-8"))["most"]


def _label(variant: Variant) -> str:
    choices = [variant.storage, variant.gradient, *(f"{name}={value}" for name, value in variant.defines)]
    return "-".join([variant.source, *filter(None, choices)])


def _quick(variant: Variant, architecture: str) -> bool:
    """One architecture; without attention in bf16 with a bias or the symmetry, which compiles for ten seconds."""
    heavy = variant.source == "attention.cu" and variant.storage == "bfloat16" and len(variant.defines) > 1
    return architecture == QUICK_ARCHITECTURE and not heavy


CASES = [
    pytest.param(
        variant,
        architecture,
        id=f"{_label(variant)}-{architecture}",
        marks=() if _quick(variant, architecture) else pytest.mark.slow,
    )
    for architecture in nvrtc.ARCHITECTURES
    for variant in all_variants()
]


@pytest.mark.parametrize(("variant", "architecture"), CASES)
def test_every_kernel_compiles_within_its_declared_resources(variant: Variant, architecture: str, most: Any) -> None:
    found = nvrtc.resources_of(variant, architecture)
    entries = {variant.entry(name) for name in kernel_parameters(variant.source)}
    assert {entry.kernel for entry in found} == entries
    limits = most[variant.source]
    for entry in found:
        limit = limits[nvrtc.declared_name(variant, entry.kernel)]
        print(f"{entry.kernel} {architecture}: {entry.registers} registers, {entry.spill_bytes} bytes spilled")
        assert entry.registers <= limit["registers"] <= MOST_REGISTERS, entry
        assert entry.shared_bytes <= limit["shared_bytes"], entry
        assert entry.spill_bytes <= limit["spill_bytes"], entry


def test_the_report_names_the_kernels_that_exist(most: Any) -> None:
    for source in sorted({variant.source for variant in all_variants()}):
        wanted = {f"{name}_{storage}" for name in kernel_parameters(source) for storage in ("float32", "bfloat16")}
        assert {name.partition("+")[0] for name in most[source]} == wanted, source


@pytest.mark.parametrize("source", SOURCES_WITH_STRUCTS)
def test_structs_lie_as_the_launcher_packs_them(source: str) -> None:
    variant = next(variant for variant in all_variants() if variant.source == source)
    text = with_layout_asserted(source, "__INTADDR__(&(({struct}*)0)->{field})")
    assert nvrtc.compile_kernels(text, source, variant.options, "sm_90")


def test_every_source_is_compiled() -> None:
    sources = {path.name for path in source_directory().glob("*.cu")}
    assert {variant.source for variant in all_variants()} == sources


def test_an_error_is_one_line_with_the_sources_own_line() -> None:
    before = "float rotated(int d) const {"
    text = load_source("rotary.cu").replace(before, f"{before} nowhere;")
    line = 1 + (source_directory() / "rotary.cu").read_text(encoding="utf-8").split(before)[0].count("\n")
    with pytest.raises(UserError, match=rf"^NVRTC cannot compile rotary.cu for sm_90: rotary.cu\({line}\): error"):
        nvrtc.compile_kernels(text, "rotary.cu", Variant("rotary.cu", "float32").options, "sm_90")


def test_the_report_is_read_right() -> None:
    """A kernel made to spill: 200 values live at once under a limit of 32 registers."""
    body = "".join(f"float v{i} = p[{i} * n];" for i in range(200)) + "__syncthreads();"
    body += "".join(f"p[{i} * n + 1] = v{i};" for i in range(200))
    source = (
        f'extern "C" __global__ void heavy(float* p, int n) {{ __shared__ float s[64]; s[0] = n; {body} p[0] = s[n]; }}'
    )
    (entry,) = nvrtc.compile_kernels(source, "heavy.cu", ["-maxrregcount=32"], "sm_90")
    assert (entry.kernel, entry.architecture) == ("heavy", "sm_90")
    assert entry.registers <= 32
    assert entry.spill_bytes > 0
    assert entry.shared_bytes == 256
