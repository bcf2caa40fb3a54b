"""What an optimizer's update rule provides: one class a rule, its arithmetic an operation of the backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.ops.registry import Operations
from cllm_gpu.ops.stream import Device
from cllm_gpu.optim.bounds import Growth
from cllm_gpu.optim.parameter_groups import ParameterGroup, parameter_groups


@dataclass(frozen=True)
class UpdateArrays:
    """What one call of a rule reads and writes: flat arrays (n,) of one segment."""

    weights: Any
    """Updated in place; float32 or wider, or bfloat16 if `rounding` is given."""
    gradients: Any
    """Only read; of the weights' dtype or narrower."""
    state: Mapping[str, Any]
    """Moments by name, updated in place; float32 or wider."""
    copy: Any | None
    """Gets the rounded weights; None if the weights have no copy of a narrower dtype."""
    rounding: StochasticRounding | None
    """How the weights are rounded; None if the update is subtracted as it is."""
    decayed: int
    """Elements of the prefix that weight decay applies to."""
    shapes: tuple[tuple[slice, tuple[int, ...]], ...]
    """(place, shape) of every parameter in them, for a rule that steps matrices as such."""


class UpdateRule(ABC):
    """How a gradient updates weights and moments. A new rule is a subclass and a line in `optimizer.RULES`."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    @classmethod
    def groups(cls, config: OptimizerConfig) -> tuple[ParameterGroup, ...]:
        """Which parameters are stepped by which rule in a run of this one: all by this one, unless overridden."""
        return parameter_groups(config)

    @classmethod
    @abstractmethod
    def state_names(cls, config: OptimizerConfig) -> tuple[str, ...]:
        """Names of the moments kept, each of as many elements as the parameters; they start at zero.

        Rules of one run may share a name: each has the part of its own parameters.
        """

    @property
    def growth(self) -> Growth | None:
        """Bounds on a step. None if the rule knows none: weights and moments are then copied before every step, to be
        put back should the step not be finite.
        """
        return None

    @abstractmethod
    def step(self, ops: Operations, arrays: UpdateArrays, *, rate: float, step: int, gradient_scale: float) -> float:
        """One update in place; returns Σ update² in float64. `gradient_scale` (clipping) multiplies every gradient.

        step: number of this update, from 1.
        """


class DeviceUpdateRule(UpdateRule):
    """A rule whose step can also be enqueued on a device, its changing numbers read there."""

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the moments that bias corrections are for; 0 without corrections."""
        return 0.0, 0.0

    @property
    def decoupled_decay(self) -> float:
        """Weight decay that is multiplied by the learning rate alone."""
        return 0.0

    @abstractmethod
    def step_on_device(
        self, device: Device, arrays: UpdateArrays, *, numbers: Any, clip: Any, skip: Any, total: Any
    ) -> None:
        """`step` without waiting for the device.

        numbers: (3,) float32, as cuda/step_numbers.cuh. clip: (1,) float32, multiplies every gradient. skip: (1,)
        int32; if it is not 0 nothing is updated. total: (1,) float64, gets Σ update².
        """
