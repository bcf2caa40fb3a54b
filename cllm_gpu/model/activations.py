"""The arrays a model needs for one (B, T), as its layers declare them: planned, sized, allocated once, never moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.devices.buffers import Plan
from cllm_gpu.devices.logit_chunks import ON_HOST, LogitChunks
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import Layer, PlanRequest, Temporary
from cllm_gpu.model.layers.tree import ModelLayers, model_layers
from cllm_gpu.model.recompute import Recompute, is_kept
from cllm_gpu.ops.reference.dropout import Dropout


def plan_activations(
    a: Architecture,
    batch: int,
    length: int,
    dtype: Any,
    *,
    training: bool,
    recompute: Recompute = "none",
    logit_chunks: LogitChunks = ON_HOST,
    gradient_dtype: Any | None = None,
) -> Plan:
    """The arrays of `Activations`. Without `training` the blocks share one set, and no gradient is planned.

    gradient_dtype: of the parameters' gradients, which lie elsewhere; None: `dtype`.
    """
    request = PlanRequest(batch, length, dtype, training, logit_chunks, gradient_dtype or dtype)
    layers, plan = model_layers(a), Plan()
    stream = (request.rows, a.width)
    plan.add("branch", stream, dtype)
    for layer in layers.outside_blocks:
        for activation in layer.activations(request):
            plan.add(f"{layer.name}.{activation.name}", activation.shape, activation.dtype)
    _plan_blocks(plan, layers, request, recompute)
    if training:
        plan.add("dresidual", stream, dtype)
        plan.add("dnormed", stream, dtype)
        _plan_temporaries(plan, layers, request)
    return plan


def _plan_blocks(plan: Plan, layers: ModelLayers, request: PlanRequest, recompute: Recompute) -> None:
    """What every block keeps for itself, then what all of them share: everything where there is no backward."""
    shared = {}
    for block in layers.blocks:
        for layer in block.all:
            for activation in layer.activations(request):
                if not (request.training and is_kept(recompute, activation.recomputed)):
                    shared[_shared(layer, activation.name)] = activation
                elif activation.name not in layer.aliases:
                    plan.add(f"{layer.name}.{activation.name}", activation.shape, activation.dtype)
    for name, activation in shared.items():
        plan.add(name, activation.shape, activation.dtype)


def _plan_temporaries(plan: Plan, layers: ModelLayers, request: PlanRequest) -> None:
    pools: dict[str, int] = {}
    for layer in (*layers.outside_blocks, *layers.blocks[0].all):
        for temporary in layer.temporaries(request):
            if temporary.pool is None:
                plan.add(_shared(layer, temporary.name), temporary.shape, temporary.dtype)
            else:
                pools[temporary.pool] = max(pools.get(temporary.pool, 0), temporary.bytes)
    for pool, size in pools.items():
        plan.add(_pool(pool), (size,), "uint8")


def _shared(layer: Layer, name: str) -> str:
    """In a plan: an array that the layers of this role have together."""
    return f"{layer.role}.{name}"


def _pool(name: str) -> str:
    return f"pool.{name}"


def batch_dropout(a: Architecture, *, seed: int, step: Any, first: int) -> Dropout | None:
    """The masks of a training batch from its sequence `first` on, to be given a site; None for a model without dropout.

    step: as in `Dropout`.
    """
    if a.dropout == 0.0:
        return None
    return Dropout(a.dropout, seed, step, site=0, first_element=first * a.context * a.width)


class Activations:
    """Arrays for one batch of B sequences of T tokens; `first_row` is where it starts in a batch split over threads.

    `activations["blocks.0.attention"].qkv` is an array of a layer, by the layer's name and the array's.
    """

    def __init__(
        self,
        architecture: Architecture,
        backend: Backend,
        batch: int,
        length: int,
        dtype: Any,
        *,
        training: bool,
        recompute: Recompute = "none",
        first_row: int = 0,
        gradient_dtype: Any | None = None,
    ) -> None:
        self.batch, self.length = batch, length
        self.training, self.recompute = training, recompute
        self._first_element = first_row * architecture.width
        plan = plan_activations(
            architecture, batch, length, dtype,
            training=training, recompute=recompute, logit_chunks=backend.logit_chunks, gradient_dtype=gradient_dtype,
        )  # fmt: skip
        views = plan.allocate(backend.empty_bytes)
        self.bytes = plan.bytes
        self.branch: Any = views["branch"]
        """(N, C), what a branch is about to give to the residual stream."""
        self.dresidual: Any = views.get("dresidual")
        """(N, C), gradient of the residual stream."""
        self.dnormed: Any = views.get("dnormed")
        """(N, C), gradient of a norm's output, or of the branch before it."""
        self.lattice: Any = None
        """`LatticeInputs` of the last forward; None for standard attention."""
        self.token_order: Any = None
        """(N,) int64, the positions sorted by their token, where the caller has sorted them already; else None."""
        self._request = PlanRequest(batch, length, dtype, training, backend.logit_chunks, gradient_dtype or dtype)
        self._layers = model_layers(architecture).all
        self._arrays = {layer.name: _arrays(layer, self._request, views) for layer in self._layers}
        for layer in self._layers:
            for name, (other, there) in layer.aliases.items():
                setattr(self[layer.name], name, getattr(self[other], there))

    def __getitem__(self, layer: str) -> Any:
        """The arrays of the layer called so, as attributes."""
        return self._arrays[layer]

    @property
    def names(self) -> list[str]:
        """Of the layers, in the order of the forward."""
        return list(self._arrays)

    @property
    def losses(self) -> Any:
        """(N,), of the last pass."""
        return self["head"].losses

    def diagnosed(self) -> Iterator[tuple[str, Any]]:
        """(name, array) of every activation that diagnostics look at, in the order of the forward.

        A name comes once for each block, or once for the model.
        """
        for layer in self._layers:
            for activation in layer.activations(self._request):
                if activation.diagnosed is not None:
                    yield activation.diagnosed, getattr(self[layer.name], activation.name)

    def dropout(self, dropout: Dropout | None, site: int) -> Dropout | None:
        """The mask of one dropout of the model (0: embedding; then the branches in order) for these rows."""
        if dropout is None:
            return None
        return dataclasses.replace(dropout, site=site, first_element=dropout.first_element + self._first_element)


def _arrays(layer: Layer, request: PlanRequest, views: dict[str, Any]) -> SimpleNamespace:
    """A layer's arrays among the views of a plan; optional ones are None unless they were planned."""
    found: dict[str, Any] = dict.fromkeys(layer.optional)
    for name in (activation.name for activation in layer.activations(request) if activation.name not in layer.aliases):
        found[name] = views.get(f"{layer.name}.{name}", views.get(_shared(layer, name)))
    for temporary in layer.temporaries(request) if request.training else ():
        found[temporary.name] = _temporary(layer, temporary, views)
    return SimpleNamespace(**found)


def _temporary(layer: Layer, temporary: Temporary, views: dict[str, Any]) -> Any:
    if temporary.pool is None:
        return views[_shared(layer, temporary.name)]
    return views[_pool(temporary.pool)][: temporary.bytes].view(temporary.dtype).reshape(temporary.shape)
