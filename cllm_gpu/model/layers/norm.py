"""What every norm of the residual stream has; what it computes is a subclass's, `LayerNorm`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import Activation, Layer, Pass, PlanRequest
from cllm_gpu.model.recompute import Recompute
from cllm_gpu.ops.reference.dropout import Dropout


class Norm(Layer, ABC):
    """The norm before a branch, or, as "final_norm", before the head.

    The branch before it is added to the residual stream in the same operation.
    """

    def __init__(self, a: Architecture, role: str, block: int | None, site: int) -> None:
        """site: of the dropout between the branch before it and the residual stream."""
        super().__init__(role, block)
        self._a, self._site = a, site
        self._is_first, self._is_final = site == 0, block is None
        if self._is_first:  # no branch comes before it
            self.aliases["residual"] = ("embedding", "output")

    def activations(self, request: PlanRequest) -> list[Activation]:
        """residual (N, C), the stream with the branch added; normed (N, C); the rows' statistics."""
        shape, dtype = (request.rows, self._a.width), request.dtype
        stream = self.role.removesuffix("_norm") + "_residual"
        # the stream before the attention is what a whole block is computed again from
        level: Recompute | None = None if self.role == "attention_norm" else "block"
        return [
            Activation("residual", shape, dtype, recomputed=level, diagnosed=stream),
            Activation("normed", shape, dtype, recomputed="pointwise"),
            *self.statistics(request),
        ]

    def forward(self, x: Pass, stream: Any, branch: Any | None) -> tuple[Any, Any]:
        """The residual stream (N, C) with dropout(branch) added, and its norm (N, C); without a branch the stream."""
        own = x.activations[self.name]
        if branch is None:
            self.normalise(x, stream)
            return stream, own.normed
        self.add_and_normalise(x, stream, branch, x.site(self._site))
        return own.residual, own.normed

    def recompute(self, x: Pass) -> None:
        """normed, from the stream, which has the branch before it added already, dropout included."""
        self.normalise(x, x.activations[self.name].residual)

    def backward(self, x: Pass) -> Any:
        """Add the gradient of the norm's input, from dnormed (N, C), to the stream's, dresidual (N, C).

        The final norm starts the stream's gradient. dnormed and dresidual are of the pass's activations.

        Returns the gradient (N, C) of the branch that was added to the stream before it (of the embedding, at the first
        one): the stream's, through the dropout between them. With dropout it takes the place of dnormed, where it
        stays until the branch's own backward writes there.
        """
        activations, dropout = x.activations, x.site(self._site)
        dbranch = None if dropout is None else activations.dnormed
        self.normalise_backward(x, None if self._is_final else activations.dresidual, dbranch, dropout)
        return activations.dresidual if dbranch is None else dbranch

    @abstractmethod
    def statistics(self, request: PlanRequest) -> list[Activation]:
        """A number or two of each row, kept for the backward."""

    @abstractmethod
    def normalise(self, x: Pass, stream: Any) -> None:
        """normed and the statistics from stream (N, C)."""

    @abstractmethod
    def add_and_normalise(self, x: Pass, stream: Any, branch: Any, dropout: Dropout | None) -> None:
        """residual = stream + dropout(branch), all (N, C); normed and the statistics from it."""

    @abstractmethod
    def normalise_backward(self, x: Pass, dresidual: Any | None, dbranch: Any | None, dropout: Dropout | None) -> None:
        """The stream's gradient (N, C), in the pass's dresidual, from its dnormed, plus `dresidual` unless None.

        With dropout also dbranch (N, C), its gradient through the mask; without, `dbranch` is None. And the gradients
        of the parameters.
        """
