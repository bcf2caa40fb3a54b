"""What goes on inside a training step, layer by layer: gradients, weights, their updates, and the largest activations.

With `training.diagnose_every` a record per look is appended to diagnostics.jsonl beside a run's metrics. A look reads
what the step has computed anyway (only the logits are computed again, into their own array), so a run that is looked
at has the very bits of one that is not; a step that is not looked at does nothing more than before.

A record is plain data:

    step         as in the metrics, from 1
    skipped      why the step was refused, or null
    parameters   name → size (elements); gradient, weight, update: Euclidean norms of the gradient of the whole batch
                 before clipping, of the weights before the step, and of what the step changed them by, as it arrived:
                 rounding included; zeros, subnormals: elements of the gradient that are 0, and that are not but lie
                 below the least normal number of their dtype
    activations  kind → largest absolute value, layer by layer, over the step's last micro-batch: in each block
                 attention_residual and mlp_residual, the residual stream before the attention and before the MLP; qkv;
                 lse, the logarithm of a row's sum of exponentials of attention scores, at least the largest score;
                 attended, the attention's output; hidden and activated, the MLP before and after GELU; once for the
                 model final_residual, the stream at the end, and logits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cllm_gpu.model.activations import Activations
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import wide_dtype

DIAGNOSTICS = "diagnostics.jsonl"


def is_due(every: int, step: int) -> bool:
    """Whether `step`, counted from 1, is looked at: the first and every multiple of `every`; 0: none."""
    return every > 0 and (step == 1 or step % every == 0)


class Look:
    """A look at one step: made after its gradients and before its update; `record` is called after the update."""

    def __init__(
        self, model: Transformer, activations: Sequence[Activations], gradients: FlatParameters, weights: FlatParameters
    ) -> None:
        """`activations`: those of the step's last micro-batch. `weights`: what the update is subtracted from."""
        self._model, self._weights = model, weights
        self._before = weights.layout.views(weights.flat.copy())
        self._gradients = {name: self._gradient(view) for name, view in gradients.items()}
        self._activations = largest_activations(model, activations)

    def record(self, step: int, skipped: str | None) -> dict[str, Any]:
        """The record of this look."""
        parameters = {
            name: {
                **found,
                "weight": self._norm(self._before[name]),
                "update": self._norm(_wide(self._weights[name]) - _wide(self._before[name])),
            }
            for name, found in self._gradients.items()
        }
        return {"step": step, "skipped": skipped, "parameters": parameters, "activations": self._activations}

    def _gradient(self, gradient: Any) -> dict[str, Any]:
        xp, wide = self._model.backend.xp, _wide(gradient)
        zeros = int(xp.count_nonzero(wide == 0))
        below = int(xp.count_nonzero(xp.abs(wide) < np.finfo(wide.dtype).tiny))  # bfloat16's is float32's
        return {
            "size": gradient.size,
            "gradient": self._norm(gradient),
            "zeros": zeros,
            "subnormals": below - zeros,
        }

    def _norm(self, x: Any) -> float:
        return math.sqrt(self._model.ops.squared_norm(x.reshape(-1)))


def largest_activations(model: Transformer, activations: Sequence[Activations]) -> dict[str, list[float]]:
    """Kind → the largest |x| in each layer over the last forward of training `activations`; NaN if an array has one.

    Kinds are those of `Activations.diagnosed` with a value for each array of that name, and `logits`, with one.
    """
    xp = model.backend.xp
    found: dict[str, list[float]] = {}
    for arrays in zip(*(w.diagnosed() for w in activations), strict=True):
        kind = arrays[0][0]
        found.setdefault(kind, []).append(largest([_magnitude(xp, x) for _, x in arrays]))
    found["logits"] = [largest([_magnitude(xp, logits) for w in activations for logits in model.last_logits(w)])]
    return found


def _wide(x: Any) -> Any:
    return x.astype(wide_dtype(x.dtype), copy=False)


def _magnitude(xp: Any, x: Any) -> float:
    return float(xp.abs(_wide(x)).max())


def largest(values: Sequence[float]) -> float:
    """The largest; NaN where one is, whatever the order."""
    return math.nan if any(map(math.isnan, values)) else max(values)
