"""What a training run will allocate, from its configuration, before anything is allocated."""

from __future__ import annotations

from cllm_gpu.architecture import Architecture
from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.memory import MemoryPlan
from cllm_gpu.optimizers import optimizer_bytes
from cllm_gpu.parallel import gradient_layout, workers_plan
from cllm_gpu.parameters import Layout, parameter_specs


def plan_memory(config: Config, architecture: Architecture, backend: Backend) -> MemoryPlan:
    """What a run will allocate, before anything is allocated."""
    layout = Layout(parameter_specs(architecture), backend.dtype)
    micro = config.training.micro_batch or config.training.batch
    gradients = gradient_layout(layout, backend, config.training.batch, micro)
    work = workers_plan(architecture, backend, layout, micro, architecture.context, gradients=gradients)
    return MemoryPlan(
        parameters=layout.bytes,
        gradients=gradients.bytes + work.gradients,
        optimizer=optimizer_bytes(config.optimizer, layout),
        activations=work.activations,
        working=backend.working_bytes,
        parameter_count=layout.count,
    )
