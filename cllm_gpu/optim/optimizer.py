"""How a gradient becomes an update: global-norm clipping, then a step of each parameter group's update rule.

The arithmetic is the rules' (`adamw`, `sgd`); this file owns the state (moments, master weights, the number of
updates), the clipping, and the refusal of gradients that would do damage.
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
from cllm_gpu.optim.adamw import Adam, AdamW
from cllm_gpu.optim.parameter_groups import Segment, segments
from cllm_gpu.optim.sgd import SGD
from cllm_gpu.optim.update_rule import DeviceUpdateRule, UpdateArrays, UpdateRule

RULES: dict[str, type[UpdateRule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
"""Update rules by the names that `config.OptimizerConfig` takes."""
DEVICE_SEGMENTS = 2
"""A step on the device has numbers for two learning rates, and sums for two segments."""
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
    """(5,) float64: Σ losses and Σ g² before; Σ update² of the first and of the second segment, and whether the step
    was skipped, afterwards. What no segment writes must be 0."""
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
    rules = (RULES[group.rule] for group in RULES[config.name].groups(config))
    return tuple(dict.fromkeys(name for rule in rules for name in rule.state_names(config)))


def keeps_masters(config: OptimizerConfig, layout: Layout) -> bool:
    """Whether the weights are held in float32 beside parameters of a narrower dtype."""
    return is_narrow(layout.dtype) and config.master_weights


def optimizer_bytes(config: OptimizerConfig, layout: Layout) -> int:
    """Memory of an optimizer's moments and master weights in bytes, known before any of it is allocated."""
    return (len(state_names(config)) + keeps_masters(config, layout)) * layout.widened().bytes


class Optimizer:
    """The update rule `config.name` for parameters of one layout, group by group (`parameter_groups`).

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
        self._segments = segments(layout, RULES[config.name].groups(config))
        self._shapes = {segment.part.start: layout.shapes(segment.part) for segment in self._segments}
        self._rules = {segment.rule: RULES[segment.rule](config) for segment in self._segments}
        self._begun = False
        self._largest = math.sqrt(float(np.finfo(wide.dtype).max))
        self._ops, self._device = backend.ops, backend.device

    def weights(self, parameters: FlatParameters) -> FlatParameters:
        """The weights themselves: the masters, or `parameters` without masters.

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
        squared = 0.0
        for segment in self._segments:
            squared += self._rules[segment.rule].step(
                self._ops, self._arrays(parameters, gradients, segment, self.updates),
                rate=float(rate) * segment.rate_multiple, step=self.updates + 1, gradient_scale=scale,
            )  # fmt: skip
        self.updates += 1
        return StepReport(gradient_norm, math.sqrt(squared), applied=True)

    @property
    def device_obstacle(self) -> str | None:
        """Why `apply_on_device` cannot take the step, to follow "steps wait"; None if it can."""
        for name, rule in self._rules.items():
            if not isinstance(rule, DeviceUpdateRule):
                return f"for the optimizer {name} (it has no step on the device)"
        if len(self._rules) > 1 or len(self._segments) > DEVICE_SEGMENTS or len(self._other_rates()) > 1:
            return "for the parameter groups (on the device one update rule has two segments of two rates at most)"
        return None

    def apply_on_device(
        self, parameters: FlatParameters, gradients: FlatParameters, decision: Decision, *, maximum_skipped: int
    ) -> None:
        """`apply` for what `decision` holds, without waiting for the device. `device_obstacle` must be None.

        The decision, clipping and corrections are taken there, in the arithmetic of `apply`; so is the count of
        updates, and that of skips in a row: after `maximum_skipped` of them nothing is applied any more. Who reads the
        results adds to `updates`.
        """
        assert self._device is not None
        (rule,) = self._rules.values()
        assert isinstance(rule, DeviceUpdateRule)
        (beta1, beta2), other_rates = rule.betas, self._other_rates()
        self._device.decide_step(
            decision.results[:2], decision.rate, decision.counts, decision.numbers, decision.clip, decision.skip,
            decision.draw, decision.results[4:],
            beta1=beta1, beta2=beta2, decay=rule.decoupled_decay, other_rate=other_rates[0] if other_rates else 1.0,
            clip_norm=self.config.clip_norm, largest=self._largest,
            maximum_skipped=maximum_skipped, storage=self.layout.dtype.name,
        )  # fmt: skip
        for index, segment in enumerate(self._segments):
            rule.step_on_device(
                self._device, self._arrays(parameters, gradients, segment, decision.draw),
                numbers=decision.numbers[int(segment.rate_multiple != 1.0)], clip=decision.clip, skip=decision.skip,
                total=decision.results[2 + index : 3 + index],
            )  # fmt: skip

    def _clipping(self, gradient_norm: float) -> float:
        """What every gradient is multiplied by."""
        if not self.config.clip_norm:
            return 1.0
        if not math.isfinite(gradient_norm):
            return math.nan
        return min(1.0, self.config.clip_norm / (gradient_norm + CLIP_MARGIN))

    def _other_rates(self) -> list[float]:
        """Multiples of the configured rate that segments have, besides 1."""
        return sorted({segment.rate_multiple for segment in self._segments} - {1.0})

    def _arrays(
        self, parameters: FlatParameters, gradients: FlatParameters, segment: Segment, updates: Any
    ) -> UpdateArrays:
        """What a step on a segment reads and writes. updates: those before it, a number or (1,) on the device."""
        part, copy, rounding = segment.part, None, None
        if self.masters is not None:
            copy = parameters.flat[part]
        elif is_narrow(self.layout.dtype):
            rounding = StochasticRounding(self.seed, updates, part.start)
        names = self._rules[segment.rule].state_names(self.config)
        return UpdateArrays(
            weights=self.weights(parameters).flat[part],
            gradients=gradients.flat[part],
            state={name: self.state[name].flat[part] for name in names},
            copy=copy,
            rounding=rounding,
            decayed=segment.decayed,
            shapes=self._shapes[segment.part.start],
        )
