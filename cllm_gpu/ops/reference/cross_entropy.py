"""Softmax cross-entropy over the vocabulary and its gradient, computed in place in the logits' buffer.

    loss = log Σ_v exp(x_v) − x_target,   dx = (softmax(x) − onehot(target))·gradient_scale

The row maximum is subtracted first, so exponentials do not overflow. Rows whose target is `ignore_index` have loss 0
and gradient 0.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.reference.arguments import require_ids, require_shape
from cllm_gpu.ops.reference.tiling import row_tiles
from cllm_gpu.ops.specification import operation

IGNORE_INDEX = -1
"""Target excluded from loss, gradient and accuracy, in all targets that this package makes."""


@operation(writes=("logits", "losses"))
def cross_entropy(
    xp: Any, logits: Any, targets: Any, losses: Any, *, ignore_index: int, gradient_scale: float | None
) -> None:
    """losses (N), in nats, from logits (N, V) and targets (N) int32.

    The logits are overwritten by the gradient of gradient_scale·Σ losses; if gradient_scale is None, they are kept.
    """
    require_ids(xp, "targets", targets, logits.shape[1], ignored=ignore_index)
    require_shape("targets", targets, logits.shape[:1])
    require_shape("losses", losses, logits.shape[:1])
    for rows in row_tiles(xp, *logits.shape):
        target = targets[rows]
        counted = target != ignore_index
        column = xp.where(counted, target, 0)
        index = xp.arange(target.size)
        x = logits[rows] if gradient_scale is not None else logits[rows].copy()
        x -= x.max(axis=1, keepdims=True)
        chosen = x[index, column]
        xp.exp(x, out=x)
        total = x.sum(axis=1)
        losses[rows] = xp.where(counted, xp.log(total) - chosen, 0.0)
        if gradient_scale is not None:
            weight = counted.astype(x.dtype)
            weight *= gradient_scale
            x *= (weight / total)[:, None]
            x[index, column] -= weight
