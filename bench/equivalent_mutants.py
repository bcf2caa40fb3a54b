"""Mutations of the project's kernels that provably change nothing, each with the proof in a line.

Keyed as mutation.Mutant.key: file, the line, the line after it, "before -> after", and which occurrence in the line.
"""

from __future__ import annotations

from cllm_gpu.simulator.mutation import Key

_FOUR = "for (int i = 0; i < 4; i++)"
_FLAT = "for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < size; at += stride) {"
_NOTHING_LEFT = "at = size leaves a count of 0: nothing is read or written, and zeros are added, as epsilon is above 0"
_COUNT = "const int count = size - at < 4 ? int(size - at) : 4;"
_COUNT_IN_PLACE = "const Four four = load_four(x + at, size - at < 4 ? int(size - at) : 4);"

EQUIVALENT: dict[Key, str] = {
    ("adam.cu", _FOUR, "if (i < count) four.v[i] = to_float(p[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FOUR, "if (i < count) store(p + i, four.v[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FLAT, _COUNT, "< -> <=", 1): _NOTHING_LEFT,
    ("adam.cu", _FLAT, _COUNT_IN_PLACE, "< -> <=", 1): _NOTHING_LEFT,
    (
        "adam.cu",
        "if (skip != nullptr) *skip = !(sum <= 1.7976931348623157e308);",
        "}",
        "<= -> <",
        1,
    ): "a sum of fewer than 2^63 squares of finite floats is below 2^319, all others are infinite or NaN: never equal",
    (
        "embedding.cu",
        "const int count = rows - begin < SEGMENT ? int(rows - begin) : SEGMENT;",
        "for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {",
        "- -> +",
        1,
    ): "only a last, short segment changes: places past its end are row 0 with token -1; the last run ends before them "
    "as it did, and their sum goes to the last segment's tails, which nothing reads",
    (
        "layernorm.cu",
        "for (int turn = 0; turn < groups; turn++) {" + 28 * " " + "// the warps of the block add up in order",
        "if (turn == group) {",
        "< -> <=",
        1,
    ): "one more turn, which is no group's: only one more barrier, which the whole block reaches",
    (
        "layernorm.cu",
        "for (int p = 0; p < PACKS; p++) {",
        "if (first + p * step >= columns) continue;",
        "< -> <=",
        1,
    ): "warps share the columns only where one can keep them all (_split in cllm_gpu.fused.layernorm), so that "
    "PACKS * step >= columns and the added round is left at once",
}
