"""What a training run will allocate, from its configuration, before anything is allocated."""

from __future__ import annotations

from cllm_gpu.architecture import Architecture
from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.memory import MemoryPlan
from cllm_gpu.optimizers import optimizer_bytes
from cllm_gpu.parallel import workers_plan
from cllm_gpu.parameters import Layout, parameter_specs
from cllm_gpu.recompute import LEVELS


def plan_memory(config: Config, architecture: Architecture, backend: Backend) -> MemoryPlan:
    """What a run will allocate, before anything is allocated."""
    layout = Layout(parameter_specs(architecture), backend.dtype)
    batch, level = config.training.at_once, config.training.recompute
    work = {
        other: workers_plan(architecture, backend, layout, batch, architecture.context, recompute=other)
        for other in LEVELS
    }
    return MemoryPlan(
        parameters=layout.bytes,
        gradients=layout.bytes + work[level].gradients,
        optimizer=optimizer_bytes(config.optimizer, layout),
        activations=work[level].activations,
        working=backend.working_bytes,
        parameter_count=layout.count,
        recompute=level,
        activations_at=tuple((other, work[other].activations) for other in LEVELS),
    )
