"""Blocks of the fused attention backward add to dQ in turns: broken turns are seen, the source's are whole."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda import launcher
from cllm_gpu.ops.cuda.attention_fused import FusedTiles, tiles_of
from cllm_gpu.ops.cuda.kernel_source import load_source, source_directory
from cllm_gpu.ops.cuda.score_bias import score_bias_defines
from cllm_gpu.ops.cuda.variants import HEAD_SIZES
from cllm_gpu.ops.reference.score_bias import ScoreBias
from cllm_gpu.simulator import KernelError, RawKernel, settings
from tests.ops.cuda.devices import DTYPES, simulator_device
from tests.ops.cuda.test_attention import Case, Problem
from tests.ops.cuda.test_tiles import DISTANCE, MATCHES

CASE = Case(1, 70, 70, 1, 1, 8, True)  # in fp32 three tiles of keys and of queries
DAMAGE: dict[str, tuple[str, str, str]] = {
    "no fence before the turn is passed on": ("__threadfence();", "", "race"),
    "the turn is not passed on": ("atomicExch(counter, turn);", "", "waiting"),
    "the turn is not waited for": ("if (threadIdx.x == 0) wait_for_turn(counter, place);", "", "race"),
    "the turn is passed on before all have written": (
        "__syncthreads();\n        if (threadIdx.x == 0) pass_turn",
        "if (threadIdx.x == 0) pass_turn",
        "race",
    ),
    "tiles are drawn in the order opposite to the turns": (
        "tiles - 1 - int(drawn % tiles)",
        "drawn % tiles",
        "waiting",
    ),
    "the last one does not set the counter back": ("final ? 0 : place + 1", "place + 1", "waiting"),
}
MOST_SHARED = 163 * 1024
"""Bytes a block may have on sm_80 (CUDA C++ programming guide, 16.4, table of compute capabilities)."""


@pytest.mark.parametrize("name", DAMAGE)
def test_broken_turns_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, kind = DAMAGE[name]

    def damaged(source: str) -> str:
        text = load_source(source)
        if source != "attention_fused.cu":
            return text
        assert text.count(before) == 1, f"{before!r} stands {text.count(before)} times in the source"
        return text.replace(before, after)

    device = simulator_device()
    problem = Problem(device, np.random.default_rng(1), CASE, "float32")
    problem.run(device)
    monkeypatch.setattr(launcher, "load_source", damaged)

    def two_calls() -> None:
        """What a call leaves behind shows in the next one."""
        problem.backward(device, "fused")
        problem.backward(device, "fused")

    with settings(check=True), pytest.raises(KernelError) as caught:
        two_calls()
    assert caught.value.kind == kind, str(caught.value)


@pytest.mark.parametrize("storage", list(DTYPES))
def test_every_tile_of_queries_gets_the_turns_it_waits_for(storage: str) -> None:
    """Lengths around the tiles' sizes: a turn too many or too few is an error, or leaves a counter that is not 0."""
    device = simulator_device()
    for queries, more, causal in itertools.product((1, 31, 33, 64, 129), (0, 1, 33, 128), (True, False)):
        case = Case(1, queries, queries + more, 2, 1, 8, causal)
        problem = Problem(device, np.random.default_rng(2), case, storage)
        problem.run(device, "fused")
        assert all(np.isfinite(device.get(x).astype(np.float64)).all() for x in problem.gradients), case
        assert not device.launcher.counters(1 + case.heads * queries).any(), case


@pytest.mark.parametrize("size", [*HEAD_SIZES, 1, 19, 65])
def test_a_block_fits_on_every_card(size: int) -> None:
    for storage, score_bias in itertools.product(DTYPES, (None, MATCHES, DISTANCE)):
        tiles = tiles_of(storage, size, score_bias)
        assert tiles.shared_bytes + 128 <= MOST_SHARED, (
            storage,
            score_bias,
            tiles,
        )  # 128: the ticket, and what aligns it


CONSTANTS = """
extern "C" __global__ void constants(int* out) {
    out[0] = THREADS, out[1] = TILE_KEYS, out[2] = TILE_QUERIES, out[3] = SHARED, out[4] = 4 * PART_FLOATS4;
}
"""


@pytest.mark.parametrize(("size", "score_bias"), [(19, None), (80, None), (64, MATCHES), (128, DISTANCE)])
def test_tiles_are_the_sources_own(size: int, score_bias: ScoreBias | None) -> None:
    simulator_device()
    header = (source_directory() / "attention_fused_bfloat16.cuh").as_posix()
    defines = [("CLLM_BF16", 1), ("HEAD_SIZE", size), *score_bias_defines(score_bias)]
    options = [f"-I{source_directory()}", *(f"-D{name}={value}" for name, value in defines)]
    out: Any = np.zeros(5, np.int32)
    RawKernel(f'#include "{header}"\n{CONSTANTS}', "constants", options=options)((1,), (1,), (out,))
    assert tiles_of("bfloat16", size, score_bias) == FusedTiles(*map(int, out))
