"""Memory traffic of a launch by source line: bank conflicts in shared memory, sectors in global memory."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_gpu.simulator.symbols import Place


@dataclass(frozen=True)
class LineTraffic:
    """The accesses of all warps at one source line."""

    place: Place
    shared: bool
    """True for shared memory, False for global."""
    instructions: int
    """Number of accesses of a warp."""
    passes: int
    """Shared: passes over the 32 banks. Global: 32-byte sectors accessed."""
    ideal: int
    """Minimum number of passes or sectors for the same number of bytes."""

    @property
    def conflicts(self) -> int:
        """Passes or sectors beyond the ideal."""
        return self.passes - self.ideal


@dataclass(frozen=True)
class Traffic:
    """All source lines of a launch that access memory."""

    lines: tuple[LineTraffic, ...]

    @property
    def bank_conflicts(self) -> int:
        """Extra passes over the banks of shared memory in the whole launch."""
        return sum(line.conflicts for line in self.lines if line.shared)

    def __str__(self) -> str:
        rows = [f"{'memory':8}{'instructions':>14}{'passes':>12}{'ideal':>12}  where"]
        for line in self.lines:
            kind = "shared" if line.shared else "global"
            rows.append(f"{kind:8}{line.instructions:14}{line.passes:12}{line.ideal:12}  {line.place}")
        return "\n".join(rows)


def merge(found: list[LineTraffic]) -> Traffic:
    """One entry per source line and memory."""
    merged: dict[tuple[Place, bool], LineTraffic] = {}
    for line in found:
        key = line.place, line.shared
        other = merged.get(key)
        merged[key] = (
            line
            if other is None
            else LineTraffic(
                line.place,
                line.shared,
                line.instructions + other.instructions,
                line.passes + other.passes,
                line.ideal + other.ideal,
            )
        )
    return Traffic(tuple(sorted(merged.values(), key=lambda item: (item.place.file, item.place.line, item.shared))))
