"""Token and position embedding: the beginning of the residual stream."""

from __future__ import annotations

from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import INITIAL_DEVIATION, Activation, Layer, ParameterSpec, Pass, PlanRequest

DROPOUT_SITE = 0


class Embedding(Layer):
    """The rows of the tokens, plus those of their positions where positions are learned; then dropout."""

    def __init__(self, a: Architecture) -> None:
        super().__init__("embedding")
        self._a = a

    def parameters(self) -> list[ParameterSpec]:
        """token_embedding (V, C); position_embedding (T, C) where positions are learned."""
        a = self._a
        specs = [
            ParameterSpec("token_embedding", (a.vocabulary, a.width), INITIAL_DEVIATION, looked_up=not a.tied_head)
        ]
        if a.positions == "learned":
            shape = (a.context, a.width)
            specs.append(ParameterSpec("position_embedding", shape, INITIAL_DEVIATION, looked_up=True))
        return specs

    def activations(self, request: PlanRequest) -> list[Activation]:
        """output (N, C)."""
        return [Activation("output", (request.rows, self._a.width), request.dtype)]

    def forward(self, x: Pass) -> Any:
        """The residual stream (N, C) at its beginning."""
        p, stream = x.parameters, x.activations[self.name].output
        x.ops.embedding_forward(
            x.tokens, p["token_embedding"], p.get("position_embedding"), stream,
            first_position=x.first_position, dropout=x.site(DROPOUT_SITE),
        )  # fmt: skip
        return stream

    def backward(self, x: Pass, doutput: Any, dtokens: Any) -> None:
        """Gradients of the embeddings from doutput (N, C), the dropout's mask applied.

        dtokens (V, C): where the token embedding's is summed; with a tied head it holds the head's already.
        """
        x.ops.embedding_backward(
            doutput, x.tokens, dtokens, x.gradients.get("position_embedding"),
            accumulate_tokens=x.accumulate or self._a.tied_head, accumulate_positions=x.accumulate,
            order=x.activations.token_order,
        )  # fmt: skip
