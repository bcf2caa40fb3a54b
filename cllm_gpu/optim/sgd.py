"""Stochastic gradient descent, with momentum or without. Its arithmetic is `sgd_step`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.ops.registry import Operations
from cllm_gpu.ops.stream import Device
from cllm_gpu.optim.bounds import Growth
from cllm_gpu.optim.update_rule import DeviceUpdateRule, UpdateArrays


class SGD(DeviceUpdateRule):
    """SGD, weight decay as an L2 term of the clipped gradient."""

    @classmethod
    def state_names(cls, config: OptimizerConfig) -> tuple[str, ...]:
        """The velocity, if there is momentum."""
        return ("velocity",) if config.momentum else ()

    @property
    def growth(self) -> Growth:
        """The velocity, or without momentum the gradient itself."""
        moment = "velocity" if self.config.momentum else None
        return Growth(moment, carry=self.config.momentum, gain=1.0, coupled_decay=self.config.weight_decay)

    def step(self, ops: Operations, arrays: UpdateArrays, *, rate: float, step: int, gradient_scale: float) -> float:
        """As `UpdateRule.step`."""
        squared: float = ops.sgd_step(
            arrays.weights, arrays.gradients, arrays.state.get("velocity"), arrays.copy,
            rate=rate, gradient_scale=gradient_scale, **self._settings(arrays),
        )  # fmt: skip
        return squared

    def step_on_device(
        self, device: Device, arrays: UpdateArrays, *, numbers: Any, clip: Any, skip: Any, total: Any
    ) -> None:
        """As `DeviceUpdateRule.step_on_device`."""
        device.sgd_step(
            arrays.weights, arrays.gradients, arrays.state.get("velocity"), arrays.copy,
            gradient_scale=1.0, numbers=numbers, clip=clip, skip=skip, total=total, **self._settings(arrays),
        )  # fmt: skip

    def _settings(self, arrays: UpdateArrays) -> dict[str, Any]:
        return {
            "momentum": self.config.momentum,
            "weight_decay": self.config.weight_decay,
            "decayed": arrays.decayed,
            "rounding": arrays.rounding,
        }
