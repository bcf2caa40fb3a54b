"""Errors that the simulator detects in kernels and captured steps."""

from __future__ import annotations

from cllm_gpu.utils.errors import UserError

KINDS = (
    "out of range",
    "misaligned",
    "uninitialised",
    "race",
    "asynchronous copy",
    "divergence",
    "waiting",
    "warp mask",
    "shared memory",
    "arithmetic",
    "trap",
    "time limit",
    "crash",
)
"""Every value of KernelError.kind."""


class CaptureError(UserError):
    """A captured step broke a rule of capture: it allocated, read on the host, or used memory not on the device."""


class KernelError(UserError):
    """A kernel did something invalid. The message has the kernel, the source line, block, thread and the error."""

    def __init__(
        self, message: str, kind: str, line: int, block: tuple[int, int, int], thread: tuple[int, int, int]
    ) -> None:
        super().__init__(message)
        self.kind = kind
        """One of KINDS."""
        self.line = line
        """Line in the kernel's source, or in a header if only that is known; 0 if unknown."""
        self.block = block
        self.thread = thread
