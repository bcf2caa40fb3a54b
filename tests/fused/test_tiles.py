"""What the host asks for of the attention kernels, rows of a block and shared memory, is what their sources say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.fused.attention import Tiles, tiles_of
from cllm_gpu.fused.sources import source_directory
from cllm_gpu.simulator import RawKernel
from tests.fused.devices import simulator_device

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
    ("storage", "size", "terms"),
    [
        ("float32", 17, False),
        ("bfloat16", 64, False),
        ("bfloat16", 64, True),
        ("bfloat16", 96, False),
        ("bfloat16", 128, True),
    ],
)
def test_tiles_are_the_sources_own(storage: str, size: int, terms: bool) -> None:
    """Also at the greatest head size of each cut."""
    simulator_device()
    options = [f"-I{source_directory()}", f"-DHEAD_SIZE={size}", f"-DTERM_MATCHES={8 * terms}"]
    out: Any = np.zeros(6, np.int32)
    RawKernel(_source(storage), "constants", options=[*options, *["-DCLLM_BF16=1"] * (storage == "bfloat16")])(
        (1,), (1,), (out,)
    )
    assert tiles_of(storage, size, terms=terms) == Tiles(*map(int, out))
