"""Mutations of the project's kernels that provably change nothing, each with the proof in a line.

Keyed as mutation.Mutant.key: file, the line, the line after it, "before -> after", and which occurrence in the line.
"""

from __future__ import annotations

from cllm_gpu.simulator.mutation import Key

_FOUR = "for (int i = 0; i < 4; i++)"
_FLAT = "for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < size; at += stride) {"
_NOTHING_LEFT = "at = size leaves a count of 0: nothing is read or written, and zeros are added"
_COUNT = "const int count = size - at < 4 ? int(size - at) : 4;"
_COUNT_IN_PLACE = "const Four four = load_four(x + at, size - at < 4 ? int(size - at) : 4);"
_FIRST_STAGE = "if (at < query_tiles) Stage{stages}.load(q, dout, lse, delta, n, b, h, at * TILE_QUERIES);"

EQUIVALENT: dict[Key, str] = {
    ("adam.cu", _FOUR, "if (i < count) four.v[i] = to_float(p[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FOUR, "if (i < count) store(p + i, four.v[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FLAT, _COUNT, "< -> <=", 1): _NOTHING_LEFT,
    ("adam.cu", _FLAT, _COUNT_IN_PLACE, "< -> <=", 1): _NOTHING_LEFT,
    ("attention_fused_bfloat16.cuh", _FIRST_STAGE, "copy_async_commit();", "< -> <=", 1): (
        "equal only without any query, where a load reads nothing and nobody reads what it writes"
    ),
}
