"""The transformer: forward and backward over its layers, mirrored line by line.

tokens → embedding → L × (layer norm → attention → residual; layer norm → MLP → residual) → layer norm → head, and the
same road back. The residual stream is added to just before the next layer norm, in one operation. N = B·T rows
everywhere.

The model itself holds only the parameters and a few constants; the arrays of one (B, T) are a `Activations`, so several
passes may be under way at once, each on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.kv_cache import KeyValueCache
from cllm_gpu.model.layers.layer import Pass
from cllm_gpu.model.layers.tree import Block, model_layers
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.model.recompute import is_kept
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.dropout import Dropout


class Transformer:
    """A decoder-only pre-norm transformer over `parameters`."""

    def __init__(self, architecture: Architecture, backend: Backend, parameters: FlatParameters) -> None:
        self.architecture = architecture
        self.backend = backend
        self.ops = backend.ops
        self.parameters = parameters
        self.layers = model_layers(architecture)
        dtype = wide_dtype(parameters.layout.dtype)
        self._constants = {layer.name: layer.constants(backend, dtype) for layer in self.layers.all}

    # ---- the pass

    def _forward(self, x: Pass) -> Any:
        """The final norm's output (N, C)."""
        ranges, layers = self.backend.ranges, self.layers
        with ranges("forward/embedding"):
            stream = layers.embedding.forward(x)
        x.activations.lattice = None if layers.crystalline is None else layers.crystalline.forward(x)
        branch = None  # (N, C), what the residual stream is about to be given
        for number, block in enumerate(layers.blocks):
            with ranges(f"forward/block_{number:02d}/attention"):
                stream, normed = block.attention_norm.forward(x, stream, branch)
                branch = block.attention.forward(x, normed)
            with ranges(f"forward/block_{number:02d}/mlp"):
                stream, normed = block.mlp_norm.forward(x, stream, branch)
                branch = block.mlp.forward(x, normed, x.activations.branch)
        _, normed = layers.final_norm.forward(x, stream, branch)
        return normed

    def _backward(self, x: Pass) -> None:
        """From the gradient of the final norm's output, in dnormed, to those of all parameters but the head's."""
        ranges, layers = self.backend.ranges, self.layers
        dbranch = layers.final_norm.backward(x)
        for number, block in reversed(list(enumerate(layers.blocks))):
            # the last block's arrays are as its forward left them
            if x.activations.recompute != "none" and block is not layers.blocks[-1]:
                with ranges(f"backward/block_{number:02d}/recompute"):
                    self._recompute(x, block)
            with ranges(f"backward/block_{number:02d}/mlp"):
                block.mlp.backward(x, dbranch, x.activations[block.mlp_norm.name].normed)
                dbranch = block.mlp_norm.backward(x)
            with ranges(f"backward/block_{number:02d}/attention"):
                block.attention.backward(x, dbranch, x.activations[block.attention_norm.name].normed)
                dbranch = block.attention_norm.backward(x)
        with ranges("backward/embedding"):
            tied = self.architecture.tied_head
            dtokens = layers.head.gradient(x) if tied else x.gradients["token_embedding"]
            layers.embedding.backward(x, dbranch, dtokens)
            layers.head.round_gradient(x)
            if layers.crystalline is not None:
                layers.crystalline.backward(x)

    def _recompute(self, x: Pass, block: Block) -> None:
        """What the backward of a block needs and its arrays do not hold any more, by the operations of the forward."""
        if x.activations.recompute == "pointwise":
            for layer in block.all:
                layer.recompute(x)
            return
        stream, normed = block.attention_norm.forward(x, x.activations[block.attention_norm.name].residual, None)
        _, normed = block.mlp_norm.forward(x, stream, block.attention.forward(x, normed))
        block.mlp.forward(x, normed, None)

    def _pass(self, activations: Activations, tokens: Any, **settings: Any) -> Pass:
        return Pass(self.ops, self.parameters, self._constants, activations, tokens, **settings)

    # ---- training

    def loss_and_gradients(
        self,
        activations: Activations,
        tokens: Any,
        targets: Any,
        gradients: FlatParameters,
        *,
        gradient_scale: float,
        accumulate: bool,
        dropout: Dropout | None = None,
    ) -> float:
        """Σ of the losses (nats) over tokens (B, T) int32 against targets (B, T); gradients of gradient_scale·Σ.

        `gradients` are overwritten, or added to when `accumulate`. `dropout` is None for a model without,
        or for a deterministic pass; its site is filled in here, and its first element counts from their first row.
        """
        self.compute_gradients(
            activations, tokens, targets, gradients,
            gradient_scale=gradient_scale, accumulate=accumulate, dropout=dropout,
        )  # fmt: skip
        return float(activations.losses.sum(dtype="float64"))

    def compute_gradients(
        self,
        activations: Activations,
        tokens: Any,
        targets: Any,
        gradients: FlatParameters,
        *,
        gradient_scale: float,
        accumulate: bool,
        dropout: Dropout | None = None,
    ) -> None:
        """`loss_and_gradients` without waiting for the device: the losses (B·T,) are left in `activations.losses`."""
        x = self._pass(activations, tokens, dropout=dropout, gradients=gradients, accumulate=accumulate)
        with self.backend.ranges("forward"):
            normed = self._forward(x)
        with self.backend.ranges("loss"):
            self.layers.head.backward(x, normed, targets.reshape(-1), gradient_scale)
        with self.backend.ranges("backward"):
            self._backward(x)

    # ---- without gradients

    def losses(self, activations: Activations, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Losses (B·T,) in nats (0 where the target is ignored) and whether the likeliest token was the target."""
        x = self._pass(activations, tokens)
        hits = self.backend.xp.empty(targets.size, dtype=bool)
        return self.layers.head.losses(x, self._forward(x), targets.reshape(-1), hits), hits

    def logits(self, activations: Activations, tokens: Any) -> Any:
        """Logits (B, T, V) of tokens (B, T), a new array: for inspection and tests."""
        x = self._pass(activations, tokens)
        out = self.backend.xp.empty((tokens.size, self.architecture.vocabulary), self.parameters.layout.dtype)
        self.layers.head.logits(x, self._forward(x), out)
        return out.reshape(*tokens.shape, -1)

    def next_logits(self, activations: Activations, tokens: Any, cache: KeyValueCache) -> Any:
        """Logits (B, V) after the last of tokens (B, T), which follow the `cache.length` tokens in the cache."""
        x, xp = self._pass(activations, tokens, cache=cache), self.backend.xp
        last = self._forward(x).reshape(*tokens.shape, -1)[:, -1]
        cache.length += tokens.shape[1]
        out = xp.empty((tokens.shape[0], self.architecture.vocabulary), last.dtype)
        self.layers.head.logits(x, xp.ascontiguousarray(last), out)
        return out

    def last_logits(self, activations: Activations) -> Iterator[Any]:
        """Logits of the last forward, (rows, V) at a time, each in the same array.

        For inspection: a backward leaves gradients where the logits were, so they are computed again.
        """
        x = self._pass(activations, None)
        for _, logits in self.layers.head.logit_chunks(x, activations[self.layers.final_norm.name].normed):
            yield logits

    def attention_weights(self, activations: Activations, layer: int, *, score_bias: bool = True) -> Any:
        """Attention weights (B, H, T, T) of a layer in the last forward, for inspection: O(T²) memory.

        score_bias: False to leave out the lattice's score bias. Raises ValueError for activations that do not hold the
        queries and keys of every block: those for inference, and for training with recompute "block".
        """
        if not activations.training:
            raise ValueError("activations made with training=False are shared by the blocks: they hold the last one's")
        if not is_kept(activations.recompute, "block"):
            raise ValueError(f"activations with recompute {activations.recompute!r} keep no queries and keys")
        return self.layers.blocks[layer].attention.weights(self._pass(activations, None), score_bias=score_bias)
