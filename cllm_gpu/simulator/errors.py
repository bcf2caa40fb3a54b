"""What a simulated kernel can be found guilty of."""

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
    "crash",
)
"""Every value of KernelError.kind."""


class CaptureError(UserError):
    """A captured step did what one must not: allocated, read on the host, or used memory that is not the device's."""


class KernelError(UserError):
    """A kernel did what CUDA forbids. One line: the kernel, what, the source line, block and thread."""

    def __init__(
        self, message: str, kind: str, line: int, block: tuple[int, int, int], thread: tuple[int, int, int]
    ) -> None:
        super().__init__(message)
        self.kind = kind
        """One of KINDS."""
        self.line = line
        """Line in the kernel's own source; where only a header's line is known, that; 0 where none is."""
        self.block = block
        self.thread = thread
