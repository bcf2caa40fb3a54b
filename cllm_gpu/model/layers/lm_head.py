"""The language-model head: logits and their cross-entropy, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import (
    INITIAL_DEVIATION,
    Activation,
    Layer,
    ParameterSpec,
    Pass,
    PlanRequest,
    Temporary,
)
from cllm_gpu.ops.precision import is_narrow, wide_dtype
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX


class LMHead(Layer):
    """Product with the head's weights (V, C), which are the token embedding's where the head is tied."""

    optional = ("dhead",)

    def __init__(self, a: Architecture) -> None:
        super().__init__("head")
        self._a = a
        self.weight = "token_embedding" if a.tied_head else "head"
        """Name of the parameter it multiplies with."""

    def parameters(self) -> list[ParameterSpec]:
        """head (V, C), unless it is tied."""
        a = self._a
        return [] if a.tied_head else [ParameterSpec("head", (a.vocabulary, a.width), INITIAL_DEVIATION)]

    def activations(self, request: PlanRequest) -> list[Activation]:
        """losses (N,); logits (rows, V), as many rows as are held at a time."""
        return [
            Activation("losses", (request.rows,), request.wide),
            Activation("logits", (self._rows_at_once(request), self._a.vocabulary), request.dtype),
        ]

    def temporaries(self, request: PlanRequest) -> list[Temporary]:
        """dhead (V, C) float32, where chunks of logits would each round the gradient they add to."""
        if self._rows_at_once(request) == request.rows or not is_narrow(request.gradient_dtype):
            return []
        return [Temporary("dhead", (self._a.vocabulary, self._a.width), request.wide)]

    def _rows_at_once(self, request: PlanRequest) -> int:
        return request.logit_chunks.at_once(request.rows, self._a.vocabulary, request.dtype, training=request.training)

    def logits(self, x: Pass, normed: Any, out: Any) -> None:
        """out (N, V) from normed (N, C)."""
        x.ops.linear_forward(normed, x.parameters[self.weight], None, out)

    def logit_chunks(self, x: Pass, normed: Any) -> Iterator[tuple[slice, Any]]:
        """(rows, their logits) of normed (N, C), in order, each in the same array."""
        buffer = x.activations[self.name].logits
        for start in range(0, len(normed), len(buffer)):
            rows = slice(start, min(start + len(buffer), len(normed)))
            logits = buffer[: rows.stop - start]
            self.logits(x, normed[rows], logits)
            yield rows, logits

    def losses(self, x: Pass, normed: Any, targets: Any, hits: Any) -> Any:
        """Losses (N,) in nats of targets (N,), 0 where ignored; `hits` (N,): whether the likeliest is the target."""
        losses = x.activations[self.name].losses
        for rows, logits in self.logit_chunks(x, normed):
            x.ops.cross_entropy(logits, targets[rows], losses[rows], ignore_index=IGNORE_INDEX, gradient_scale=None)
            wide = logits.astype(wide_dtype(logits.dtype), copy=False)  # CuPy promises argmax for no bf16
            hits[rows] = wide.argmax(axis=1) == targets[rows]
        return losses[: len(targets)]

    def backward(self, x: Pass, normed: Any, targets: Any, gradient_scale: float) -> None:
        """Losses of targets (N,); of gradient_scale · Σ losses the gradient of `normed`, in dnormed, and the head's."""
        losses, dhead = x.activations[self.name].losses, self.gradient(x)
        if x.accumulate and dhead is not x.gradients[self.weight]:
            dhead[...] = x.gradients[self.weight]
        for rows, logits in self.logit_chunks(x, normed):
            x.ops.cross_entropy(
                logits, targets[rows], losses[rows], ignore_index=IGNORE_INDEX, gradient_scale=gradient_scale
            )
            x.ops.linear_backward(
                logits, normed[rows], x.parameters[self.weight], x.activations.dnormed[rows], dhead, None,
                accumulate=x.accumulate or rows.start > 0,
            )  # fmt: skip

    def gradient(self, x: Pass) -> Any:
        """Where the head's gradient is summed: in float32 where each chunk of logits would round the gradient itself.

        A tied head's is also the token embedding's, which is added to it before it is rounded.
        """
        dhead = x.activations[self.name].dhead
        return x.gradients[self.weight] if dhead is None else dhead

    def round_gradient(self, x: Pass) -> None:
        """Round what was summed in float32 to the gradient, after all was added."""
        if (dhead := x.activations[self.name].dhead) is not None:
            x.gradients[self.weight][...] = dhead
