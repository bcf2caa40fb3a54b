"""How a gradient becomes an update: global-norm clipping, then a step of each parameter group's update rule.

The arithmetic is the rules' (`adamw`, `sgd`); this file owns the state (moments, master weights, the number of
updates), the clipping, and the refusal of gradients and updates that would do damage.
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
from cllm_gpu.ops.registry import Operations
from cllm_gpu.optim.adamw import Adam, AdamW
from cllm_gpu.optim.parameter_groups import Segment, segments
from cllm_gpu.optim.sgd import SGD
from cllm_gpu.optim.update_rule import DeviceUpdateRule, UpdateArrays, UpdateRule

RULES: dict[str, type[UpdateRule]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
"""Update rules by the names that `config.OptimizerConfig` takes."""
DEVICE_SEGMENTS = 2
"""A step on the device has numbers for two learning rates, and sums for two segments."""
OVERFLOW_MARGIN = 4.0
"""Bounds must be this factor below the largest number: they are summed norms, rounded ones."""
GRADIENT_TOO_LARGE = "gradient too large to be squared"
UPDATE_TOO_LARGE = "non-finite update (optimizer.rate or 1/epsilon times the gradient can pass what the dtype holds)"
REFUSALS = (None, GRADIENT_TOO_LARGE, UPDATE_TOO_LARGE)
"""Why a step was refused, by the outcome that `decide_step` gives on a device; None for one that was applied."""
CLIP_MARGIN = 1e-6
"""Added to the norm before the clipping factor is taken, as in torch.nn.utils.clip_grad_norm_."""


@dataclass(frozen=True)
class StepReport:
    """What one call of `Optimizer.apply` did."""

    gradient_norm: float
    """Global norm of the gradient before clipping."""
    update_norm: float
    """Global norm of what was subtracted from the parameters, before they were rounded; 0 when nothing was."""
    refused: str | None
    """Why nothing was applied, in one line: parameters, moments and `updates` are what they were. None if it was."""

    @property
    def applied(self) -> bool:
        """Whether the parameters were updated."""
        return self.refused is None


@dataclass(frozen=True)
class Decision:
    """What a step on the device decides by, and what it decides: arrays there, of which the host may read `results`."""

    results: Any
    """(5,) float64: Σ losses and Σ g² before; Σ update² of the first and of the second segment, and the outcome, an
    index of `REFUSALS`, afterwards. What no segment writes must be 0."""
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
    norms: Any
    """(2,) float64: bounds on the norms of the weights and of the first moment, as `Optimizer.norms` gives them."""


@dataclass
class _Norms:
    """Bounds on the norms of the weights, and of the first moment of every rule that knows bounds."""

    weights: float
    moments: dict[str, float]


class _Kept:
    """Copies of what a step updates."""

    def __init__(self, steps: list[UpdateArrays]) -> None:
        arrays = [array for step in steps for array in (step.weights, step.copy, *step.state.values())]
        self._kept = [(array, array.copy()) for array in arrays if array is not None]

    def is_finite(self, ops: Operations) -> bool:
        """Whether what the step left is."""
        return all(math.isfinite(ops.squared_norm(array)) for array, _ in self._kept)

    def put_back(self) -> None:
        """Everything is as it was."""
        for array, before in self._kept:
            array[...] = before


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
        self._norms: _Norms | None = None
        self._limit = float(np.finfo(wide.dtype).max) / OVERFLOW_MARGIN
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
        """`parameters` become what the masters round to, after the weights were set; without masters they stay."""
        self._norms = None
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
        (nothing changed) when its norm is not finite, or, after clipping, too large to be squared in the moments'
        dtype: an infinite second moment would freeze its parameter for the rest of the run. So is an update of which
        it is not certain that moments and weights stay finite.
        """
        scale = self._clipping(gradient_norm)
        if not (gradient_norm * scale < self._largest):  # also when it is NaN
            return StepReport(gradient_norm, 0.0, GRADIENT_TOO_LARGE)
        if not self._is_bounded(parameters, gradient_norm * scale, float(rate)):
            return StepReport(gradient_norm, 0.0, UPDATE_TOO_LARGE)
        steps = [(segment, self._arrays(parameters, gradients, segment, self.updates)) for segment in self._segments]
        kept = None if all(rule.growth for rule in self._rules.values()) else _Kept([arrays for _, arrays in steps])
        squared = 0.0
        for segment, arrays in steps:
            squared += self._rules[segment.rule].step(
                self._ops, arrays,
                rate=float(rate) * segment.rate_multiple, step=self.updates + 1, gradient_scale=scale,
            )  # fmt: skip
        if kept is not None and not (math.isfinite(squared) and kept.is_finite(self._ops)):
            kept.put_back()
            return StepReport(gradient_norm, 0.0, UPDATE_TOO_LARGE)
        self.count(gradient_norm, math.sqrt(squared))
        return StepReport(gradient_norm, math.sqrt(squared), None)

    def norms(self, parameters: FlatParameters) -> tuple[float, float]:
        """Bounds on the norms of the weights and of the first rule's first moment, by which a step is let through.

        The first call after the weights were set looks at every element; later ones know what the steps since added.
        """
        norms = self._found_norms(parameters)
        return norms.weights, next(iter(norms.moments.values()), 0.0)

    def count(self, gradient_norm: float, update_norm: float) -> None:
        """Count an update that was applied: `apply` does, and who reads the results of `apply_on_device`."""
        self.updates += 1
        if self._norms is None:
            return
        gradient = gradient_norm * self._clipping(gradient_norm)
        for name, moment in self._norms.moments.items():
            growth = self._rules[name].growth
            assert growth is not None
            self._norms.moments[name] = growth.moment_after(moment, gradient, self._norms.weights)
        self._norms.weights += update_norm

    def _is_bounded(self, parameters: FlatParameters, gradient: float, rate: float) -> bool:
        """Whether every rule that knows bounds stays finite with a scaled gradient of this norm."""
        norms = self._found_norms(parameters)
        for name, moment in norms.moments.items():
            growth = self._rules[name].growth
            assert growth is not None
            largest_rate = rate * max(s.rate_multiple for s in self._segments if s.rule == name)
            if not growth.is_finite(
                rate=largest_rate, step=self.updates + 1, gradient=gradient,
                weights=norms.weights, moment=moment, largest=self._limit,
            ):  # fmt: skip
                return False
        return True

    def _found_norms(self, parameters: FlatParameters) -> _Norms:
        if self._norms is None:
            moments = {}
            for name, rule in self._rules.items():
                if (growth := rule.growth) is not None:
                    moments[name] = self._norm(self.state[growth.moment]) if growth.moment else 0.0
            self._norms = _Norms(self._norm(self.weights(parameters)), moments)
        return self._norms

    def _norm(self, values: FlatParameters) -> float:
        return math.sqrt(self._ops.squared_norm(values.flat))

    @property
    def device_obstacle(self) -> str | None:
        """Why `apply_on_device` cannot take the step, to follow "steps wait"; None if it can."""
        for name, rule in self._rules.items():
            if not isinstance(rule, DeviceUpdateRule):
                return f"for the optimizer {name} (it has no step on the device)"
            if rule.growth is None:
                return f"for the optimizer {name} (it has no bounds on its steps)"
        if len(self._rules) > 1 or len(self._segments) > DEVICE_SEGMENTS or len(self._other_rates()) > 1:
            return "for the parameter groups (on the device one update rule has two segments of two rates at most)"
        return None

    def apply_on_device(
        self, parameters: FlatParameters, gradients: FlatParameters, decision: Decision, *, maximum_skipped: int
    ) -> None:
        """`apply` for what `decision` holds, without waiting for the device. `device_obstacle` must be None.

        The decision, clipping and corrections are taken there, in the arithmetic of `apply`; so is the count of
        updates, and that of skips in a row: after `maximum_skipped` of them nothing is applied any more. Who reads the
        results calls `count` for every update that was applied.
        """
        assert self._device is not None
        (rule,) = self._rules.values()
        assert isinstance(rule, DeviceUpdateRule)
        (beta1, beta2), other_rates, growth = rule.betas, self._other_rates(), rule.growth
        assert growth is not None
        self._device.decide_step(
            decision.results[:2], decision.rate, decision.counts, decision.numbers, decision.clip, decision.skip,
            decision.draw, decision.results[4:], decision.results[2:4], decision.norms,
            beta1=beta1, beta2=beta2, decay=rule.decoupled_decay, other_rate=other_rates[0] if other_rates else 1.0,
            clip_norm=self.config.clip_norm, largest=self._largest, limit=self._limit,
            carry=growth.carry, gain=growth.gain, amplification=growth.amplification,
            coupled_decay=growth.coupled_decay,
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
