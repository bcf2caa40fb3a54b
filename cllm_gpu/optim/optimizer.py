"""How a gradient becomes an update: global-norm clipping, then one step of SGD, Adam or AdamW on the flat buffers.

The arithmetic of a step is `backend.ops.sgd_step` and `adam_step`; this file owns the state (moments, master weights,
the number of updates), the clipping, and the refusal of gradients that would do damage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.parameters import FlatParameters, Layout
from cllm_gpu.ops.precision import is_narrow
from cllm_gpu.ops.reference.rounding import StochasticRounding

CLIP_MARGIN = 1e-6
"""Added to the norm before the clipping factor is taken, as in torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True)
class StepReport:
    """What one call of `Optimizer.apply` did."""

    gradient_norm: float
    """Global norm of the gradient before clipping."""
    update_norm: float
    """Global norm of what was subtracted from the parameters, before they were rounded; 0 when nothing was."""
    applied: bool
    """False: the gradient was refused; parameters, moments and `updates` are what they were."""


@dataclass(frozen=True)
class Decision:
    """What a step on the device decides by, and what it decides: arrays there, of which the host may read `results`."""

    results: Any
    """(5,) float64: Σ losses and Σ g² before; Σ update² of the ordinary and of the lattice's parameters, and whether
    the step was skipped, afterwards. What no part of the parameters writes must be 0."""
    rate: Any
    """(1,) float64."""
    counts: Any
    """(2,) int32: updates applied so far, skips in a row."""
    numbers: Any
    """(2, 3) float32, as cuda/step_numbers.cuh."""
    clip: Any
    """(1,) float32."""
    skip: Any
    """(1,) int32."""
    draw: Any
    """(1,) uint32: updates before this one."""


def state_names(config: OptimizerConfig) -> tuple[str, ...]:
    """Names of the flat moments an optimizer keeps, each of as many elements as the parameters."""
    if config.name == "sgd":
        return ("velocity",) if config.momentum else ()
    return ("first_moment", "second_moment")


def keeps_masters(config: OptimizerConfig, layout: Layout) -> bool:
    """Whether the weights are held in float32 beside parameters of a narrower dtype."""
    return is_narrow(layout.dtype) and config.master_weights


def optimizer_bytes(config: OptimizerConfig, layout: Layout) -> int:
    """Memory of an optimizer's moments and master weights in bytes, known before any of it is allocated."""
    return (len(state_names(config)) + keeps_masters(config, layout)) * layout.widened().bytes


class Optimizer:
    """SGD with momentum, Adam or AdamW (`config.name`) for parameters of one layout.

    Weight decay reaches the matrices only (the layout's decayed prefix): as an L2 term of the gradient in SGD and Adam
    (added after clipping), decoupled from it in AdamW. The lattice's scalars, which come last, take `lattice_rate`
    times the learning rate.

    Moments are float32 at least. For parameters of a narrower dtype a step is taken on float32 masters, whose rounding
    the parameters then are; or, with `config.master_weights` off, on the parameters themselves, rounded stochastically
    by random words of `seed`.
    """

    def __init__(self, config: OptimizerConfig, backend: Backend, layout: Layout, *, seed: int = 1) -> None:
        self.config = config
        self.layout = layout
        self.seed = seed
        self.updates = 0
        """Updates applied so far: Adam's t. Together with `state` and the weights it is all a checkpoint needs."""
        wide = layout.widened()
        self.state: dict[str, FlatParameters] = {
            name: wide.views(backend.zeros(wide.size, wide.dtype)) for name in state_names(config)
        }
        self.masters: FlatParameters | None = None
        if keeps_masters(config, layout):
            self.masters = wide.views(backend.zeros(wide.size, wide.dtype))
        self._begun = False
        self._largest = math.sqrt(float(np.finfo(wide.dtype).max))
        self._ops, self._device = backend.ops, backend.device

    def weights(self, parameters: FlatParameters) -> FlatParameters:
        """The weights themselves: the masters, or `parameters` where there are none.

        Masters begin as the parameters they are first asked for with. Whoever sets them calls `round_masters`.
        """
        if self.masters is None:
            return parameters
        if not self._begun:
            self.masters.flat[...] = parameters.flat
            self._begun = True
        return self.masters

    def round_masters(self, parameters: FlatParameters) -> None:
        """`parameters` become what the masters round to, after these were set; without masters nothing happens."""
        if self.masters is not None:
            parameters.flat[...] = self.masters.flat

    def gradient_norm(self, gradients: FlatParameters) -> float:
        """√Σ g² over the whole flat buffer, summed in float64; not finite when any element is not."""
        return math.sqrt(self._ops.squared_norm(gradients.flat))

    def apply(
        self, parameters: FlatParameters, gradients: FlatParameters, *, rate: float, gradient_norm: float
    ) -> StepReport:
        """One update of `parameters` in place. `gradient_norm` is `self.gradient_norm(gradients)`.

        The gradient is scaled by min(1, clip_norm/(gradient_norm + 1e-6)) unless clip_norm is 0. It is refused
        (`applied` false, nothing changed) when its norm is not finite, or, after clipping, too large to be squared in
        the moments' dtype: an infinite second moment would freeze its parameter for the rest of the run.
        """
        scale = self._clipping(gradient_norm)
        if not (gradient_norm * scale < self._largest):  # also when it is NaN
            return StepReport(gradient_norm, 0.0, applied=False)
        step = self._sgd if self.config.name == "sgd" else self._adam
        squared = 0.0
        for part, multiple in self._parts():
            squared += step(parameters, gradients.flat[part], part, float(rate) * multiple, scale)
        self.updates += 1
        return StepReport(gradient_norm, math.sqrt(squared), applied=True)

    def apply_on_device(
        self, parameters: FlatParameters, gradients: FlatParameters, decision: Decision, *, maximum_skipped: int
    ) -> None:
        """`apply` for what `decision` holds, without waiting for the device.

        The decision, clipping and corrections are taken there, in the arithmetic of `apply`; so is the count of
        updates, and that of skips in a row: after `maximum_skipped` of them nothing is applied any more. Who reads the
        outcome adds to `updates`.
        """
        assert self._device is not None
        config, adam = self.config, self.config.name != "sgd"
        self._device.decide_step(
            decision.results[:2], decision.rate, decision.counts, decision.numbers, decision.clip, decision.skip,
            decision.draw, decision.results[4:],
            beta1=config.beta1 if adam else 0.0, beta2=config.beta2 if adam else 0.0,
            decay=config.weight_decay if config.name == "adamw" else 0.0,
            other_rate=config.lattice_rate, clip_norm=config.clip_norm, largest=self._largest,
            maximum_skipped=maximum_skipped, storage=self.layout.dtype.name,
        )  # fmt: skip
        for row, (part, _) in enumerate(self._parts()):
            given: dict[str, Any] = {"numbers": decision.numbers[row], "clip": decision.clip, "skip": decision.skip}
            given["total"] = decision.results[2 + row : 3 + row]
            step = self._adam_on_device if adam else self._sgd_on_device
            step(parameters, gradients.flat[part], part, decision.draw, given)

    def _clipping(self, gradient_norm: float) -> float:
        """What every gradient is multiplied by."""
        if not self.config.clip_norm:
            return 1.0
        if not math.isfinite(gradient_norm):
            return math.nan
        return min(1.0, self.config.clip_norm / (gradient_norm + CLIP_MARGIN))

    def _parts(self) -> list[tuple[slice, float]]:
        """The flat arrays in parts of one learning rate each, as a multiple of the configured one."""
        ordinary, size = self.layout.ordinary, self.layout.size
        parts = [(slice(0, ordinary), 1.0), (slice(ordinary, size), self.config.lattice_rate)]
        return [(part, multiple) for part, multiple in parts if part.stop > part.start]

    def _held(
        self, parameters: FlatParameters, part: slice, updates: Any
    ) -> tuple[Any, Any | None, StochasticRounding | None]:
        """What a step on a part of the flat arrays subtracts from, where its rounding goes, and how it is rounded.

        updates: those before this one, a number or (1,) on the device.
        """
        own, weights = parameters.flat[part], self.weights(parameters).flat[part]
        if self.masters is not None:
            return weights, own, None
        return own, None, StochasticRounding(self.seed, updates, part.start) if is_narrow(own.dtype) else None

    def _sgd(self, parameters: FlatParameters, gradients: Any, part: slice, rate: float, scale: float) -> float:
        weights, copy, rounding = self._held(parameters, part, self.updates)
        squared: float = self._ops.sgd_step(
            weights, gradients, *self._moments(part), copy,
            rate=rate, gradient_scale=scale, rounding=rounding, **self._sgd_settings(part),
        )  # fmt: skip
        return squared

    def _adam(self, parameters: FlatParameters, gradients: Any, part: slice, rate: float, scale: float) -> float:
        weights, copy, rounding = self._held(parameters, part, self.updates)
        squared: float = self._ops.adam_step(
            weights, gradients, *self._moments(part), copy,
            rate=rate, step=self.updates + 1, gradient_scale=scale, rounding=rounding, **self._adam_settings(part),
        )  # fmt: skip
        return squared

    def _sgd_on_device(
        self, parameters: FlatParameters, gradients: Any, part: slice, draw: Any, given: dict[str, Any]
    ) -> None:
        assert self._device is not None
        weights, copy, rounding = self._held(parameters, part, draw)
        self._device.sgd_step(
            weights, gradients, *self._moments(part), copy,
            gradient_scale=1.0, rounding=rounding, **self._sgd_settings(part), **given,
        )  # fmt: skip

    def _adam_on_device(
        self, parameters: FlatParameters, gradients: Any, part: slice, draw: Any, given: dict[str, Any]
    ) -> None:
        assert self._device is not None
        weights, copy, rounding = self._held(parameters, part, draw)
        self._device.adam_step(
            weights, gradients, *self._moments(part), copy=copy, measure=True,
            gradient_scale=1.0, rounding=rounding, **self._adam_settings(part), **given,
        )  # fmt: skip

    def _moments(self, part: slice) -> list[Any]:
        """The moments of a part, as its step takes them: SGD without momentum has None for its velocity."""
        moments = [self.state[name].flat[part] for name in state_names(self.config)]
        return moments or [None]

    def _decayed(self, part: slice) -> int:
        return self.layout.decayed if part.start == 0 else 0

    def _sgd_settings(self, part: slice) -> dict[str, Any]:
        config = self.config
        return {
            "momentum": config.momentum,
            "weight_decay": config.weight_decay,
            "decayed": self._decayed(part),
        }

    def _adam_settings(self, part: slice) -> dict[str, Any]:
        config = self.config
        return {
            "beta1": config.beta1,
            "beta2": config.beta2,
            "epsilon": config.epsilon,
            "weight_decay": config.weight_decay,
            "decayed": self._decayed(part),
            "decoupled": config.name == "adamw",
        }
