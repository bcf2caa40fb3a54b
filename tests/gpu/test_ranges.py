"""Profiler ranges: one per CUDA operation, named, entered and left in order, also when the operation fails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.registry import OPERATIONS, cuda_operations, operations_on
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import Ranges
from tests.gpu.training_runs import Run, tiny_architecture


class FakeDomain:
    """An NVTX domain that keeps what was pushed and popped."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, ...]] = []

    def get_event_attributes(self, *, message: str) -> str:
        return message

    def push_range(self, attributes: str) -> None:
        self.open.append(attributes)
        self.seen.append(tuple(self.open))

    def pop_range(self) -> None:
        self.open.pop()


@pytest.mark.parametrize("name", operations_on("cuda"))
def test_every_operation_has_a_range(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = FakeDomain()
    inside: list[list[str]] = []
    module = f"cllm_gpu.ops.cuda.{OPERATIONS[name].module}"
    monkeypatch.setattr(f"{module}.{name}", lambda launcher: inside.append(list(domain.open)))
    launcher: Any = None
    getattr(cuda_operations(launcher, Ranges(domain)), name)()
    assert inside == [[f"operation/{name}"]]
    assert domain.open == []


def test_a_range_ends_when_its_operation_fails() -> None:
    domain = FakeDomain()
    operations = cuda_operations(Launcher(np, None), Ranges(domain))
    with pytest.raises(UserError):
        operations.squared_norm(np.zeros((2, 2), np.float32))
    assert domain.open == []


def test_operations_lie_inside_the_models_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/profiling.md shows: forward/block_00/attention holds operation/attention_forward, and so on."""
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    domain = FakeDomain()
    monkeypatch.setattr("cllm_gpu.utils.profiling._nvtx_domain", lambda: domain)
    Run(get_backend("simulator"), tiny_architecture(layers=1)).step()
    seen = set(domain.seen)
    assert ("forward", "forward/block_00/attention", "operation/attention_forward") in seen
    assert ("backward", "backward/block_00/mlp", "operation/mlp_backward") in seen
    assert ("loss", "operation/cross_entropy") in seen
    assert ("operation/adam_step",) in seen
    assert domain.open == []
