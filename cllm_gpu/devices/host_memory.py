"""Host memory: what this process holds, and what is available."""

from __future__ import annotations

import os
from pathlib import Path


def anonymous_bytes() -> int | None:
    """Memory this process has allocated and touched, mapped files left out; None if unknown (not Linux)."""
    return _kilobytes("/proc/self/status", "RssAnon")


def available_bytes() -> int | None:
    """Memory that programs may still take without swapping; what a control group leaves, where that is less.

    Where the system does not say what is available, all there is; None if it does not say that either (Windows).
    """
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    if available is None:
        try:
            available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None
    left = _left_in_group(Path("/sys/fs/cgroup"))
    return available if left is None else min(available, left)


def _left_in_group(folder: Path) -> int | None:
    """What the control group of this process (version 2) may still take; None if it has no limit.

    Pages of files that nothing uses count as free: the system takes them back first.
    """
    try:
        limit, used, statistics = (
            (folder / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        unused = dict(line.split() for line in statistics.splitlines()).get("inactive_file", "0")
        return max(0, int(limit) - max(0, int(used) - int(unused)))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None


def _kilobytes(file: str, name: str) -> int | None:
    """Bytes of a line "name:  123 kB" of a file in /proc."""
    try:
        text = Path(file).read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None
