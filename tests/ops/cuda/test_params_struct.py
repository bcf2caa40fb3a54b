"""Structs that kernels take by value are read from the source, and lie in memory as the host's compiler has them."""

from __future__ import annotations

import struct

import pytest

from cllm_gpu.ops.cuda.params_struct import parse_declaration, read_struct
from cllm_gpu.ops.cuda.variants import all_variants
from cllm_gpu.simulator import RawModule
from tests.ops.cuda.devices import simulator_or_skip
from tests.ops.cuda.params_layout import SOURCES_WITH_STRUCTS, with_layout_asserted

SOURCE = """
template <class T>
struct View {
    T* data;
    long long row;

    __device__ T* at(int b) const { if (b) { return data; } return data + b * row; }
};
struct Small {
    int count, wide;
    float scale;

    int twice() const { return 2 * count; }
};
struct Params {
    float epsilon;
    View<const real> x, y;
    Small sizes;
    const float *mean, *rstd;
    unsigned site;
};
"""


def test_fields_are_read_with_those_of_nested_structs() -> None:
    found = read_struct(SOURCE, "Params")
    assert found is not None
    assert [field.name for field in found.fields] == [
        "epsilon", "x", "x.row", "y", "y.row", "sizes.count", "sizes.wide", "sizes.scale", "mean", "rstd", "site"
    ]  # fmt: skip
    assert found.paths[:3] == ("epsilon", "x.data", "x.row")
    x, scale, mean = (found.fields[i] for i in (1, 7, 8))
    assert (x.type, x.pointer, x.constant) == ("real", True, True)
    assert (scale.type, scale.pointer, scale.constant) == ("float", False, False)
    assert (mean.type, mean.pointer, mean.constant) == ("float", True, True)


def test_offsets_are_aligned_also_behind_a_nested_struct() -> None:
    found = read_struct(SOURCE, "Params")
    assert found is not None
    assert found.offsets == (0, 8, 16, 24, 32, 40, 44, 48, 56, 64, 72)
    assert found.size == 80
    packed = struct.pack(found.format, *range(11))
    assert [struct.unpack_from("<i", packed, offset)[0] for offset in found.offsets[5:7]] == [5, 6]


def test_a_type_that_cannot_be_packed_is_an_error() -> None:
    with pytest.raises(ValueError, match="hold a half, which is no struct of its source"):
        read_struct("struct Params {\n    half x;\n};", "Params")


def test_another_type_is_no_struct() -> None:
    assert read_struct(SOURCE, "float") is None


def test_declarations() -> None:
    (x,) = parse_declaration("const real* __restrict__ x")
    assert (x.name, x.type, x.pointer, x.constant) == ("x", "real", True, True)
    (params,) = parse_declaration("\n    const __grid_constant__ Params params")
    assert (params.name, params.type, params.pointer) == ("params", "Params", False)


@pytest.mark.parametrize("source", SOURCES_WITH_STRUCTS)
def test_structs_lie_as_the_launcher_packs_them(source: str) -> None:
    simulator_or_skip()
    variant = next(variant for variant in all_variants() if variant.source == source)
    text = with_layout_asserted(source, "__builtin_offsetof({struct}, {field})")
    RawModule(code=text, options=variant.options).compile()
