"""What a training run will allocate, from its configuration, before anything is allocated."""

from __future__ import annotations

from functools import partial

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.devices.host_memory import MemoryPlan
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.recompute import LEVELS
from cllm_gpu.optim.optimizer import optimizer_bytes
from cllm_gpu.training.data_parallel import gradient_layout, workers_plan


def plan_memory(config: Config, architecture: Architecture, backend: Backend) -> MemoryPlan:
    """What a run will allocate, before anything is allocated."""
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
