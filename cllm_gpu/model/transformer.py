"""The transformer: forward and backward, mirrored line by line.

tokens → embedding → L × (layer norm → qkv → attention → projection → residual; layer norm → MLP → residual)
→ layer norm → logits → cross-entropy, and the same road back. The residual stream is added to just before the next
layer norm, in one operation. N = B·T rows everywhere.

A `Workspace` holds the arrays of one (B, T); the model itself holds only the parameters, so several workspaces may be
in use at once, each on a thread of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.model.activations import KeyValueCache, Workspace
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.crystalline import LatticeSide
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.model.recompute import is_kept
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.reference.symmetry import Symmetry

EPSILON = 1e-5


class Transformer:
    """A decoder-only pre-norm transformer over `parameters`."""

    def __init__(self, architecture: Architecture, backend: Backend, parameters: FlatParameters) -> None:
        self.architecture = architecture
        self.backend = backend
        self.ops = backend.ops
        self.parameters = parameters
        self.scale = 1.0 / math.sqrt(architecture.head_size)
        self._head_name = "token_embedding" if architecture.tied_head else "head"
        self._lattice = LatticeSide(architecture, backend, parameters)
        self._rotary: tuple[Any, Any] | None = None
        if architecture.positions == "rope":
            size, dtype = architecture.head_size, wide_dtype(parameters.layout.dtype)
            tables = rotary_tables(backend.xp, architecture.context, size, dtype)
            self._rotary = (backend.asarray(tables[0]), backend.asarray(tables[1]))

    def loss_and_gradients(
        self,
        workspace: Workspace,
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
        or for a deterministic pass; its site is filled in here, and its first element counts from the workspace's row.
        """
        self.compute_gradients(
            workspace, tokens, targets, gradients,
            gradient_scale=gradient_scale, accumulate=accumulate, dropout=dropout,
        )  # fmt: skip
        return float(workspace.losses.sum(dtype="float64"))

    def compute_gradients(
        self,
        workspace: Workspace,
        tokens: Any,
        targets: Any,
        gradients: FlatParameters,
        *,
        gradient_scale: float,
        accumulate: bool,
        dropout: Dropout | None = None,
    ) -> None:
        """`loss_and_gradients` without waiting for the device: the losses (B·T,) are left in `workspace.losses`."""
        with self.backend.ranges("forward"):
            self._forward(workspace, tokens, dropout)
        with self.backend.ranges("loss"):
            self._head_backward(workspace, targets, gradients, gradient_scale, accumulate)
        with self.backend.ranges("backward"):
            self._backward(workspace, tokens, gradients, dropout, accumulate)

    def losses(self, workspace: Workspace, tokens: Any, targets: Any) -> tuple[Any, Any]:
        """Losses (B·T,) in nats (0 where the target is ignored) and whether the likeliest token was the target."""
        self._forward(workspace, tokens, None)
        xp, flat = self.backend.xp, targets.reshape(-1)
        hits, wide = xp.empty(flat.size, dtype=bool), wide_dtype(workspace.logits.dtype)
        for rows, logits in self._logit_chunks(workspace, flat.size):
            self.ops.cross_entropy(
                logits, flat[rows], workspace.losses[rows], ignore_index=IGNORE_INDEX, gradient_scale=None
            )
            hits[rows] = logits.astype(wide, copy=False).argmax(axis=1) == flat[rows]  # CuPy promises it for no bf16
        return workspace.losses[: flat.size], hits

    def logits(self, workspace: Workspace, tokens: Any) -> Any:
        """Logits (B, T, V) of tokens (B, T), a new array: for inspection and tests."""
        self._forward(workspace, tokens, None)
        out = self.backend.xp.empty((tokens.size, self.architecture.vocabulary), self.parameters.layout.dtype)
        self.ops.linear_forward(workspace.final_normed, self.parameters[self._head_name], None, out)
        return out.reshape(*tokens.shape, -1)

    def next_logits(self, workspace: Workspace, tokens: Any, cache: KeyValueCache) -> Any:
        """Logits (B, V) after the last of tokens (B, T), which follow the `cache.length` tokens in the cache."""
        self._forward(workspace, tokens, None, cache)
        cache.length += tokens.shape[1]
        last = workspace.final_normed.reshape(*tokens.shape, -1)[:, -1]
        out = self.backend.xp.empty((tokens.shape[0], self.architecture.vocabulary), last.dtype)
        self.ops.linear_forward(self.backend.xp.ascontiguousarray(last), self.parameters[self._head_name], None, out)
        return out

    def last_logits(self, workspace: Workspace) -> Iterator[Any]:
        """Logits of the last forward of a training workspace, (rows, V) at a time, each in the same array.

        For inspection: a backward leaves gradients where the logits were, so they are computed again.
        """
        for _, logits in self._logit_chunks(workspace, workspace.final_normed.shape[0]):
            yield logits

    def attention_weights(self, workspace: Workspace, layer: int, *, terms: bool = True) -> Any:
        """Weights (B, H, T, T) of a layer in the last forward of a training workspace, for inspection: O(T²) memory.

        Without `terms`, as they would be had the lattice added nothing to the scores. ValueError where the workspace
        does not keep every block's queries and keys.
        """
        if not is_kept(workspace.recompute, "qkv"):
            raise ValueError(f"a workspace with recompute {workspace.recompute!r} keeps no queries and keys")
        q, k, _ = workspace.split_heads(workspace.layers[layer].qkv)
        added = self._lattice.terms(workspace.lattice, layer) if terms else None
        _, symmetry = self._symmetries(workspace)
        return self.ops.attention_weights(q, k, causal=True, scale=self.scale, terms=added, symmetry=symmetry)

    # ---- forward

    def _forward(self, w: Workspace, tokens: Any, dropout: Dropout | None, cache: KeyValueCache | None = None) -> None:
        p, ops, ranges = self.parameters, self.ops, self.backend.ranges
        first = cache.length if cache else 0
        residual = w.embedding  # (N, C)
        with ranges("forward/embedding"):
            ops.embedding_forward(
                tokens, p["token_embedding"], p.get("position_embedding"), residual,
                first_position=first, dropout=w.dropout(dropout, 0),
            )  # fmt: skip
        w.lattice = self._lattice.see(w, tokens, cache)
        branch = None  # (N, C), what the residual stream is about to be given
        for layer in range(self.architecture.layers):
            with ranges(f"forward/block_{layer:02d}/attention"):
                residual, branch = self._attention_forward(w, layer, residual, branch, dropout, cache)
            with ranges(f"forward/block_{layer:02d}/mlp"):
                residual, branch = self._mlp_forward(w, layer, residual, branch, dropout, w.branch)
        site = w.dropout(dropout, 2 * self.architecture.layers)
        self._norm_forward("final_norm", residual, branch, w.final_residual, w.final_normed, w.final_statistics, site)

    def _norm_forward(
        self, name: str, residual: Any, branch: Any | None, out: Any, normed: Any, statistics: Any, dropout: Any
    ) -> None:
        """out = residual + dropout(branch), normed = layer norm of it; with no branch yet `out` is `residual`."""
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        mean, rstd = statistics
        if branch is None:
            self.ops.layernorm_forward(residual, weight, bias, normed, mean, rstd, epsilon=EPSILON)
        else:
            self.ops.residual_layernorm_forward(
                residual, branch, weight, bias, out, normed, mean, rstd, epsilon=EPSILON, dropout=dropout
            )

    def _attention_forward(
        self, w: Workspace, layer: int, residual: Any, branch: Any | None, dropout: Dropout | None, cache: Any
    ) -> tuple[Any, Any]:
        p, name, a = self.parameters, f"blocks.{layer}", w.layers[layer]
        residual_out = residual if branch is None else a.attention_residual
        site = w.dropout(dropout, 2 * layer)
        self._norm_forward(
            f"{name}.attention_norm", residual, branch, residual_out, a.attention_normed, a.attention_statistics, site
        )
        self.ops.linear_forward(a.attention_normed, p[f"{name}.qkv.weight"], p.get(f"{name}.qkv.bias"), a.qkv)
        q, k, v = w.split_heads(a.qkv)  # (B, T, H, D), (B, T, K, D) twice
        of_rotary, symmetry = self._symmetries(w)
        if self._rotary is not None:
            first = cache.length if cache else 0
            self._rotate(self.ops.rotary_forward, q, k, first, of_rotary)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, S, K, D)
        terms = self._lattice.terms(w.lattice, layer)
        self.ops.attention_forward(
            q, k, v, w.heads(a.attended), a.lse, causal=True, scale=self.scale, terms=terms, symmetry=symmetry
        )
        self.ops.linear_forward(a.attended, p[f"{name}.projection.weight"], p.get(f"{name}.projection.bias"), w.branch)
        return residual_out, w.branch

    def _mlp_forward(
        self, w: Workspace, layer: int, residual: Any, branch: Any, dropout: Dropout | None, out: Any | None
    ) -> tuple[Any, Any]:
        p, name, a = self.parameters, f"blocks.{layer}", w.layers[layer]
        site = w.dropout(dropout, 2 * layer + 1)
        self._norm_forward(f"{name}.mlp_norm", residual, branch, a.mlp_residual, a.mlp_normed, a.mlp_statistics, site)
        up, down = f"{name}.mlp_up", f"{name}.mlp_down"
        self.ops.mlp_forward(
            a.mlp_normed, p[f"{up}.weight"], p.get(f"{up}.bias"), p[f"{down}.weight"], p.get(f"{down}.bias"),
            a.hidden, a.activated, out,
        )  # fmt: skip
        return a.mlp_residual, out

    def _symmetries(self, w: Workspace) -> tuple[Symmetry | None, Symmetry | None]:
        """The lattice's symmetry for who takes queries and keys first: the rotary embedding, or else attention."""
        symmetry = self._lattice.symmetry(w.lattice)
        return (None, symmetry) if self._rotary is None else (symmetry, None)

    def _rotate(self, rotation: Any, q: Any, k: Any, first: int, symmetry: Symmetry | None) -> None:
        assert self._rotary is not None
        cosine, sine = (table[first : first + q.shape[1]] for table in self._rotary)
        rotation(q, cosine, sine, symmetry=symmetry)
        rotation(k, cosine, sine, symmetry=symmetry)

    def _logit_chunks(self, w: Workspace, rows: int) -> Any:
        """(slice of rows, their logits): never more rows of logits at a time than the workspace planned."""
        head, step = self.parameters[self._head_name], w.logits.shape[0]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            logits = w.logits[: part.stop - start]
            self.ops.linear_forward(w.final_normed[part], head, None, logits)
            yield part, logits

    # ---- backward

    def _head_backward(
        self, w: Workspace, targets: Any, gradients: FlatParameters, gradient_scale: float, accumulate: bool
    ) -> None:
        flat = targets.reshape(-1)
        head, dhead = self.parameters[self._head_name], self._head_gradient(w, gradients)
        if accumulate and dhead is w.dhead:
            dhead[...] = gradients[self._head_name]
        for rows, logits in self._logit_chunks(w, flat.size):
            self.ops.cross_entropy(
                logits, flat[rows], w.losses[rows], ignore_index=IGNORE_INDEX, gradient_scale=gradient_scale
            )
            self.ops.linear_backward(
                logits,
                w.final_normed[rows],
                head,
                w.dnormed[rows],
                dhead,
                None,
                accumulate=accumulate or rows.start > 0,
            )

    def _backward(
        self, w: Workspace, tokens: Any, gradients: FlatParameters, dropout: Dropout | None, accumulate: bool
    ) -> None:
        ops, ranges = self.ops, self.backend.ranges
        depth, tied = self.architecture.layers, self.architecture.tied_head
        site = w.dropout(dropout, 2 * depth)
        dbranch = self._norm_backward(
            "final_norm", w, w.final_residual, w.final_statistics, gradients, accumulate, site
        )
        for layer in reversed(range(depth)):
            if w.recompute != "none" and layer < depth - 1:  # the last block's arrays are as its forward left them
                with ranges(f"backward/block_{layer:02d}/recompute"):
                    self._recompute(w, layer, dropout)
            with ranges(f"backward/block_{layer:02d}/mlp"):
                dbranch = self._mlp_backward(w, layer, dbranch, gradients, dropout, accumulate)
            with ranges(f"backward/block_{layer:02d}/attention"):
                dbranch = self._attention_backward(w, layer, dbranch, gradients, dropout, accumulate)
        with ranges("backward/embedding"):
            ops.embedding_backward(
                dbranch,
                tokens,
                self._head_gradient(w, gradients) if tied else gradients["token_embedding"],
                gradients.get("position_embedding"),
                accumulate_tokens=accumulate or tied,
                accumulate_positions=accumulate,
                order=w.token_order,
            )
            if w.dhead is not None:
                gradients[self._head_name][...] = w.dhead
            self._lattice.point_gradients(w, tokens, gradients, accumulate=accumulate)

    def _recompute(self, w: Workspace, layer: int, dropout: Dropout | None) -> None:
        """What the backward of a block needs and its arrays do not hold any more, by the operations of the forward.

        The residual streams that are kept have the branches before them added already, dropout included.
        """
        name, a, x = f"blocks.{layer}", w.layers[layer], w.block_input(layer)
        if w.recompute == "block":
            residual, branch = self._attention_forward(w, layer, x, None, None, None)
            self._mlp_forward(w, layer, residual, branch, dropout, None)
            return
        for norm, stream, normed, statistics in (
            ("attention_norm", x, a.attention_normed, a.attention_statistics),
            ("mlp_norm", a.mlp_residual, a.mlp_normed, a.mlp_statistics),
        ):
            self._norm_forward(f"{name}.{norm}", stream, None, stream, normed, statistics, None)
        self.ops.gelu_forward(a.hidden, None, a.activated)

    def _head_gradient(self, w: Workspace, gradients: FlatParameters) -> Any:
        """Where the head's gradient is summed: in float32 where each chunk of logits would round the gradient itself.

        A tied head's is also the token embedding's, which is added to it before it is rounded.
        """
        return gradients[self._head_name] if w.dhead is None else w.dhead

    def _norm_backward(
        self,
        name: str,
        w: Workspace,
        x: Any,
        statistics: Any,
        gradients: FlatParameters,
        accumulate: bool,
        dropout: Dropout | None,
    ) -> Any:
        """Adds the gradient of the layer norm's input to the residual stream's, w.dresidual; the final norm starts it.

        Returns the gradient (N, C) of the branch that was added to the stream before it (of the embedding, at the first
        one): the stream's, through the dropout between them. With dropout it takes the place of w.dnormed, where it
        stays until the branch's own backward writes there.
        """
        dbranch = None if dropout is None else w.dnormed
        self.ops.layernorm_backward(
            w.dnormed,
            x,
            self.parameters[f"{name}.weight"],
            *statistics,
            None if name == "final_norm" else w.dresidual,
            w.dresidual,
            dbranch,
            gradients[f"{name}.weight"],
            gradients.get(f"{name}.bias"),
            accumulate=accumulate,
            dropout=dropout,
        )
        return w.dresidual if dbranch is None else dbranch

    def _mlp_backward(
        self,
        w: Workspace,
        layer: int,
        dbranch: Any,
        gradients: FlatParameters,
        dropout: Dropout | None,
        accumulate: bool,
    ) -> Any:
        p, g, name, a = self.parameters, gradients, f"blocks.{layer}", w.layers[layer]
        up, down = f"{name}.mlp_up", f"{name}.mlp_down"
        self.ops.mlp_backward(
            dbranch, a.mlp_normed, a.hidden, a.activated, p[f"{up}.weight"], p[f"{down}.weight"], w.dhidden, w.dnormed,
            g[f"{up}.weight"], g.get(f"{up}.bias"), g[f"{down}.weight"], g.get(f"{down}.bias"), accumulate=accumulate,
        )  # fmt: skip
        site = w.dropout(dropout, 2 * layer + 1)
        return self._norm_backward(f"{name}.mlp_norm", w, a.mlp_residual, a.mlp_statistics, g, accumulate, site)

    def _attention_backward(
        self,
        w: Workspace,
        layer: int,
        dbranch: Any,
        gradients: FlatParameters,
        dropout: Dropout | None,
        accumulate: bool,
    ) -> Any:
        p, g, name, a = self.parameters, gradients, f"blocks.{layer}", w.layers[layer]
        projection, qkv = f"{name}.projection", f"{name}.qkv"
        self.ops.linear_backward(
            dbranch, a.attended, p[f"{projection}.weight"], w.dattended, g[f"{projection}.weight"],
            g.get(f"{projection}.bias"), accumulate=accumulate,
        )  # fmt: skip
        q, k, v = w.split_heads(a.qkv)
        dq, dk, dv = w.split_heads(w.dqkv)
        of_rotary, symmetry = self._symmetries(w)
        self.ops.attention_backward(
            w.heads(w.dattended), q, k, v, w.heads(a.attended), a.lse, dq, dk, dv, causal=True, scale=self.scale,
            terms=self._lattice.terms(w.lattice, layer),
            dterms=self._lattice.term_gradients(w, gradients, layer, accumulate=accumulate), symmetry=symmetry,
        )  # fmt: skip
        if self._rotary is not None:
            self._rotate(self.ops.rotary_backward, dq, dk, 0, of_rotary)
        self.ops.linear_backward(
            w.dqkv, a.attention_normed, p[f"{qkv}.weight"], w.dnormed, g[f"{qkv}.weight"], g.get(f"{qkv}.bias"),
            accumulate=accumulate,
        )  # fmt: skip
        x, site = w.block_input(layer), w.dropout(dropout, 2 * layer)
        return self._norm_backward(f"{name}.attention_norm", w, x, a.attention_statistics, g, accumulate, site)
