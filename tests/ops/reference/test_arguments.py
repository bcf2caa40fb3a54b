"""The reference refuses what the other sides refuse, naming the argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.registry import reference_operations

OPS = reference_operations(np)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (np.array([[0, -1]], np.int32), IndexError, "tokens holds -1; it must lie between 0 and 4"),
        (np.array([[0, 5]], np.int32), IndexError, "tokens holds 5; it must lie between 0 and 4"),
        (np.array([[0.0, 1.0]]), TypeError, "tokens is of dtype float64; it must be int32"),
    ],
)
def test_tokens_that_are_none(ids: Any, error: type[Exception], words: str) -> None:
    table, out = np.ones((5, 3), np.float32), np.ones((2, 3), np.float32)
    with pytest.raises(error, match=words):
        OPS.embedding_forward(ids, table, None, out)
    with pytest.raises(error, match=words):
        OPS.embedding_backward(out, ids, table, None, accumulate_tokens=False, accumulate_positions=False)


@pytest.mark.parametrize("target", [-2, 5])
def test_targets_that_are_none(target: int) -> None:
    logits, losses = np.ones((1, 5), np.float32), np.ones(1, np.float32)
    OPS.cross_entropy(logits, np.array([-1], np.int32), losses, ignore_index=-1, gradient_scale=None)
    with pytest.raises(IndexError, match=f"targets holds {target};"):
        OPS.cross_entropy(logits, np.array([target], np.int32), losses, ignore_index=-1, gradient_scale=None)


def test_mixed_dtypes_and_wrong_shapes() -> None:
    x, weight, out = (np.ones((2, 2), np.float32) for _ in range(3))
    with pytest.raises(TypeError, match="weight is of dtype float64; the other arrays are float32"):
        OPS.linear_forward(x, weight.astype(np.float64), None, out)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); it must be \(2,\)"):
        OPS.linear_forward(x, weight, np.ones(1, np.float32), out)
