"""What the host asks for of the attention kernels, rows of a block and shared memory, is what their sources say."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda import attention_fused
from cllm_gpu.ops.cuda.attention import Tiles, tiles_of
from cllm_gpu.ops.cuda.kernel_source import source_directory
from cllm_gpu.ops.cuda.score_bias import PAD_AFTER, PAD_BEFORE, score_bias_defines
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreBias
from cllm_gpu.simulator import RawKernel
from tests.ops.cuda.devices import simulator_device

MATCHES, DISTANCE = (
    ScoreBias(None, None, None, distance=distance, prime_distance=False, same_token=False, matches=8 * (not distance))
    for distance in (False, True)
)
CONSTANTS = """
#include "attention_{storage}.cuh"
extern "C" __global__ void constants(int* out) {{
    out[0] = FORWARD_ROWS, out[1] = FORWARD_SHARED, out[2] = BACKWARD_ROWS, out[3] = {queries_shared};
    out[4] = TILE_KEYS, out[5] = {keys_shared};
}}
"""


def _source(storage: str) -> str:
    if storage == "float32":
        return CONSTANTS.format(storage=storage, queries_shared="BACKWARD_SHARED", keys_shared="BACKWARD_SHARED")
    return CONSTANTS.format(storage=storage, queries_shared="QUERIES_SHARED", keys_shared="KEYS_SHARED")


@pytest.mark.parametrize(
    ("storage", "size", "score_bias"),
    [
        ("float32", 17, None),
        ("bfloat16", 64, None),
        ("bfloat16", 64, DISTANCE),
        ("bfloat16", 96, None),
        ("bfloat16", 128, MATCHES),
        ("bfloat16", 128, DISTANCE),
    ],
)
def test_tiles_are_the_sources_own(storage: str, size: int, score_bias: ScoreBias | None) -> None:
    """Also at the greatest head size of each cut."""
    simulator_device()
    options = [
        f"-I{source_directory()}",
        f"-DHEAD_SIZE={size}",
        *(f"-D{name}={n}" for name, n in score_bias_defines(score_bias)),
    ]
    out: Any = np.zeros(6, np.int32)
    RawKernel(_source(storage), "constants", options=[*options, *["-DCLLM_BF16=1"] * (storage == "bfloat16")])(
        (1,), (1,), (out,)
    )
    assert tiles_of(storage, size, score_bias) == Tiles(*map(int, out))


def test_tokens_are_padded_as_far_as_the_kernels_look() -> None:
    """Back by the longest match from the token before the first, and on to the end of the last tile."""
    simulator_device()
    out: Any = np.zeros(3, np.int32)
    source = """
    #include "score_terms.cuh"
    extern "C" __global__ void constants(int* out) { out[0] = PAD_BEFORE, out[1] = PAD_AFTER, out[2] = MATCHES; }
    """
    options = [f"-I{source_directory()}", f"-DTERM_MATCHES={MAXIMUM_MATCHES}"]
    RawKernel(source, "constants", options=options)((1,), (1,), (out,))
    assert out.tolist() == [PAD_BEFORE, PAD_AFTER, PAD_BEFORE]
    for size, storage, score_bias in itertools.product((8, 64, 96, 128), ("float32", "bfloat16"), (MATCHES, DISTANCE)):
        tiles, fused = tiles_of(storage, size, score_bias), attention_fused.tiles_of(storage, size, score_bias)
        assert max(tiles.forward_rows, tiles.query_rows, tiles.key_rows, fused.keys, fused.queries) <= PAD_AFTER + 1
