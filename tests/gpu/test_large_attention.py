"""Attention at the sizes of models, by the bounds of tests/ops/cuda: float32 by eps, bf16 by FlashAttention's rule.

The reference is NumPy's in float64, on the host; on the simulator one case of a few tiles stands in.
"""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.cuda.attention import METHODS
from tests.ops.cuda import test_attention as fused
from tests.ops.cuda.devices import Device, cupy_device, simulator_device

CASES = [
    fused.Case(2, 1024, 1024, 12, 12, 64, True, packed=True),  # GPT-2 124M
    fused.Case(1, 2048, 2048, 8, 2, 128, True),  # grouped queries
    fused.Case(2, 777, 777, 6, 2, 96, True, packed=True),  # no multiple of a tile
    fused.Case(1, 512, 2048, 8, 8, 64, True),  # queries are the last positions
    fused.Case(2, 1000, 900, 4, 4, 80, False),
    fused.Case(64, 256, 256, 6, 6, 64, True, packed=True),  # many blocks
]
SMALL = fused.Case(1, 200, 200, 2, 1, 64, True, packed=True)
CHECKS = {"float32": fused.check_float32, "bfloat16": fused.check_bfloat16}


def _check(device: Device, storage: str, case: fused.Case) -> None:
    """Every way of the backward against one reference, which takes most of the time."""
    CHECKS[storage](device, np.random.default_rng(11), case, METHODS)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", list(CHECKS))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_models(case: fused.Case, storage: str) -> None:
    _check(cupy_device(), storage, case)


@pytest.mark.parametrize("storage", list(CHECKS))
def test_attention_of_a_few_tiles(storage: str) -> None:
    _check(simulator_device(), storage, SMALL)
