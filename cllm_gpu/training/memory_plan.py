"""What a training run will allocate, from its configuration, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.recompute import LEVELS, Recompute
from cllm_gpu.optim.optimizer import optimizer_bytes
from cllm_gpu.training.data_parallel import gradient_layout, workers_plan


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of everything that is allocated once per run."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """What the operations, threads and libraries take besides, as the backend knows it."""
    parameter_count: int
    recompute: Recompute = "none"
    """The level that `activations` are of."""
    activations_at: tuple[tuple[Recompute, int], ...] = ()
    """What they would take at each level."""

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.working

    def rows(self) -> list[tuple[str, int]]:
        """(what, bytes) in the order to print."""
        return [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("working memory", self.working),
            ("total", self.total),
        ]


def plan_memory(config: Config, architecture: Architecture, backend: Backend) -> MemoryPlan:
    """The plan of a run."""
    layout = Layout(parameter_specs(architecture), backend.dtype)
    loop = config.training
    gradients = gradient_layout(layout, backend, loop.sequences, loop.at_once)
    plan = partial(workers_plan, architecture, backend, layout, loop.at_once, architecture.context, gradients=gradients)
    work = {level: plan(recompute=level) for level in LEVELS}
    return MemoryPlan(
        parameters=layout.bytes,
        gradients=gradients.bytes + work[loop.recompute].gradients,
        optimizer=optimizer_bytes(config.optimizer, layout),
        activations=work[loop.recompute].activations,
        working=backend.working_bytes,
        parameter_count=layout.count,
        recompute=loop.recompute,
        activations_at=tuple((level, work[level].activations) for level in LEVELS),
    )
