"""The lattice's symmetry on head dimensions has no CUDA kernel yet: an error, not a slow path.

As `cllm_gpu.reference.symmetry`, whose parameters these are.
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.attention_call import NO_LATTICE
from cllm_gpu.fused.launcher import Launcher


def symmetry_forward(launcher: Launcher, x: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Raises UserError."""
    raise UserError(f"symmetry_forward: {NO_LATTICE}")


def symmetry_backward(launcher: Launcher, dx: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """Raises UserError."""
    raise UserError(f"symmetry_backward: {NO_LATTICE}")
