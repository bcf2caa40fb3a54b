"""Loss, perplexity, bits per byte and accuracy of a model over batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.model.activations import Activations
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.utils.errors import UserError

Losses = Callable[[Any, Any], tuple[Any, Any]]
"""(tokens (B, T), targets (B, T)), host arrays → losses (B·T,) in nats and hits (B·T,) bool, on the device or host."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured over `tokens` counted targets."""

    loss: float
    """Mean cross-entropy, nats per token."""
    perplexity: float
    """exp(loss); inf where that overflows."""
    bits_per_byte: float | None
    """loss / ln 2 / (bytes per token); None if the bytes are not known."""
    accuracy: float
    """Share of targets that were the likeliest token."""
    tokens: int
    """Targets counted."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def evaluate(
    losses: Losses,
    batches: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]],
    bytes_per_token: float | None,
    to_host: Callable[[Any], npt.NDArray[Any]],
) -> Evaluation:
    """Over all of `batches`, pairs of tokens and targets (B, T); a target of IGNORE_INDEX is not counted.

    Sums are float64. UserError when no target is counted, or for a number of bytes per token that is not positive.
    """
    if bytes_per_token is not None and not (math.isfinite(bytes_per_token) and bytes_per_token > 0):
        raise UserError(f"{bytes_per_token} bytes per token: it must be a finite number above 0")
    total, hit, count = 0.0, 0, 0
    for tokens, targets in batches:
        counted = np.asarray(targets).reshape(-1) != IGNORE_INDEX
        values, hits = losses(tokens, targets)
        total += float(to_host(values)[counted].sum(dtype=np.float64))
        hit += int(np.count_nonzero(to_host(hits)[counted]))
        count += int(np.count_nonzero(counted))
    if count == 0:
        raise UserError("there is no token to evaluate; give a longer text")
    loss = total / count
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return Evaluation(loss, perplexity(loss), bits, hit / count, count)


def require_finite_loss(found: Evaluation, path: object) -> None:
    """UserError if the loss of the model in `path` is not a finite number."""
    if not math.isfinite(found.loss):
        raise UserError(f"the loss of the model in {path} is {found.loss}: its weights are too large to compute with")


def perplexity(loss: float) -> float:
    """exp(loss); inf where that overflows, NaN for NaN."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def model_losses(model: Transformer) -> Losses:
    """A `Losses` that runs `model`, with activations for each batch shape."""
    by_shape: dict[tuple[int, int], Activations] = {}

    def losses(tokens: npt.NDArray[Any], targets: npt.NDArray[Any]) -> tuple[Any, Any]:
        backend, (batch, length) = model.backend, tokens.shape
        activations = by_shape.get((batch, length))
        if activations is None:
            dtype = model.parameters.layout.dtype
            activations = Activations(model.architecture, backend, batch, length, dtype, training=False)
            by_shape[batch, length] = activations
        device = (backend.asarray(np.ascontiguousarray(x, dtype=np.int32)) for x in (tokens, targets))
        return model.losses(activations, *device)

    return losses
