"""What a training run will hold in memory, computed before anything is allocated, and what it was seen to hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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


def anonymous_bytes() -> int | None:
    """Memory this process has allocated and touched, mapped files left out; None where no one says (not Linux)."""
    return _status("RssAnon")


def _status(name: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
