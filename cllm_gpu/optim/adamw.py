"""Adam and AdamW. Their arithmetic is `adam_step`."""

from __future__ import annotations

from typing import Any, ClassVar

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.ops.registry import Operations
from cllm_gpu.ops.stream import Device
from cllm_gpu.optim.bounds import Growth
from cllm_gpu.optim.update_rule import DeviceUpdateRule, UpdateArrays


class Adam(DeviceUpdateRule):
    """Adam (Kingma & Ba 2015), weight decay as an L2 term of the clipped gradient."""

    decoupled: ClassVar[bool] = False

    @classmethod
    def state_names(cls, config: OptimizerConfig) -> tuple[str, ...]:
        """First and second moment."""
        return ("first_moment", "second_moment")

    def step(self, ops: Operations, arrays: UpdateArrays, *, rate: float, step: int, gradient_scale: float) -> float:
        """As `UpdateRule.step`."""
        squared: float = ops.adam_step(
            arrays.weights, arrays.gradients, *self._moments(arrays), arrays.copy,
            rate=rate, step=step, gradient_scale=gradient_scale, **self._settings(arrays),
        )  # fmt: skip
        return squared

    @property
    def growth(self) -> Growth:
        """m / (√v + ε) is at most m / ε: v may be as small as 0."""
        return Growth(
            "first_moment",
            carry=self.config.beta1,
            gain=1.0 - self.config.beta1,
            amplification=1.0 / self.config.epsilon,
            correction_beta=self.config.beta1,
            coupled_decay=0.0 if self.decoupled else self.config.weight_decay,
            decoupled_decay=self.decoupled_decay,
        )

    @property
    def betas(self) -> tuple[float, float]:
        """Decays of the two moments."""
        return self.config.beta1, self.config.beta2

    @property
    def decoupled_decay(self) -> float:
        """AdamW's weight decay."""
        return self.config.weight_decay if self.decoupled else 0.0

    def step_on_device(
        self, device: Device, arrays: UpdateArrays, *, numbers: Any, clip: Any, skip: Any, total: Any
    ) -> None:
        """As `DeviceUpdateRule.step_on_device`."""
        device.adam_step(
            arrays.weights, arrays.gradients, *self._moments(arrays), copy=arrays.copy, measure=True,
            gradient_scale=1.0, numbers=numbers, clip=clip, skip=skip, total=total, **self._settings(arrays),
        )  # fmt: skip

    def _moments(self, arrays: UpdateArrays) -> tuple[Any, Any]:
        return arrays.state["first_moment"], arrays.state["second_moment"]

    def _settings(self, arrays: UpdateArrays) -> dict[str, Any]:
        return {
            "beta1": self.config.beta1,
            "beta2": self.config.beta2,
            "epsilon": self.config.epsilon,
            "weight_decay": self.config.weight_decay,
            "decayed": arrays.decayed,
            "decoupled": self.decoupled,
            "rounding": arrays.rounding,
        }


class AdamW(Adam):
    """AdamW (Loshchilov & Hutter 2019): weight decay decoupled from the gradient."""

    decoupled = True
