"""Performance targets ("bars") of the kernels, and their evaluation from measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.kernels import lattice
from cllm_gpu.ops.cuda.attention import METHOD, METHODS, BackwardMethod

FLASH2 = "FlashAttention-2 on an H100: FlashAttention-3 paper (Shah et al. 2024), figures 5 and 6; backward: its README"
MMA = "goal for kernels on mma.sync: 69% to 87% of FlashAttention-2 on an H100, by size and direction"
PROJECT_GOAL = "the project's own goal"
LENGTHS = (1024, 4096, 16384)
ATTENTION_CARD = "H200"

# causal, bf16, TFLOP/s at T = 1k, 4k, 16k: (head size, direction) → (goal, stretch)
ATTENTION: dict[tuple[int, str], tuple[tuple[int, ...], tuple[int, ...]]] = {
    (64, "forward"): ((180, 235, 255), (229, 284, 299)),
    (64, "backward"): ((125, 190, 220), (180, 248, 278)),
    (128, "forward"): ((205, 265, 290), (260, 319, 335)),
    (128, "backward"): ((145, 220, 255), (208, 285, 325)),
}
OURS: dict[BackwardMethod, str] = {
    method: "ours" if method == METHOD else f"ours, {method}" for method in sorted(METHODS, key=lambda m: m != METHOD)
}
"""Method of the attention backward → name of its side, the default method first."""
COPY_FRACTIONS: dict[str, float] = {
    "AdamW": 0.90,
    "layer norm forward": 0.85,
    "residual + layer norm forward": 0.85,
    "residual + layer norm backward": 0.85,
    "cross-entropy": 0.85,
    "GELU forward": 0.85,
    "GELU backward": 0.85,
}
LATTICE: dict[tuple[str, int], float] = {
    (lattice.MATCHES, 64): 1.10,
    (lattice.MATCHES, 128): 1.10,
    (lattice.DISTANCES, 64): 1.25,
    (lattice.DISTANCES, 128): 1.15,
}
"""(terms, head size) → maximum time of attention with these terms, relative to attention without."""
ADAM_OVER_TORCH = 1.3
TORCH_ADAM = "torch fused"
PRODUCTS = ("linear forward", "linear backward", "MLP forward", "MLP backward")
PRODUCTS_OVER_OTHERS = 1.0


@dataclass(frozen=True)
class Bar:
    """A target and its measured value."""

    what: str
    measured: float | None
    """None if it was not measured in this run."""
    required: float
    unit: str
    source: str
    stretch: float | None = None

    @property
    def verdict(self) -> str:
        """ "reached", "stretch reached", "below" or "not measured". NaN is "below"."""
        if self.measured is None:
            return "not measured"
        if not (self.measured >= self.required):
            return "below"
        if self.stretch is not None and self.measured >= self.stretch:
            return "stretch reached"
        return "reached"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the result file."""
        return {
            "what": self.what,
            "measured": self.measured,
            "required": self.required,
            "stretch": self.stretch,
            "unit": self.unit,
            "verdict": self.verdict,
            "source": self.source,
        }


Row = Mapping[str, Any]
"""A row as returned by `jobs.measure`: kernel, side, size, milliseconds, tera_per_second, …"""


def _ours(rows: Iterable[Row], kernel: str, side: str = "", **size: Any) -> list[Row]:
    return [
        row
        for row in rows
        if row["kernel"] == kernel
        and (row["side"] == side if side else row["side"].startswith("ours"))
        and row["milliseconds"] is not None
        and all(row["size"].get(name) == value for name, value in size.items())
    ]


def attention_bars(rows: Sequence[Row], card: str) -> list[Bar]:
    """TFLOP/s of attention, with each method of the backward; only for the GPU that the targets are defined for."""
    if ATTENTION_CARD not in card:
        return []
    bars = []
    for (size, direction), (goals, stretches) in ATTENTION.items():
        for side in OURS.values() if direction == "backward" else ("ours",):
            for length, goal, stretch in zip(LENGTHS, goals, stretches, strict=True):
                found = _ours(rows, f"attention {direction}", side, T=length, D=size)
                measured = found[0]["tera_per_second"] if found else None
                what = f"attention {direction}{side.removeprefix('ours')} D={size} T={length}"
                bars.append(Bar(what, measured, goal, "TFLOP/s", f"{MMA}; stretch: {FLASH2}", stretch))
    return bars


def lattice_bars(rows: Sequence[Row]) -> list[Bar]:
    """Crystalline relative to standard attention, forward and backward; inverted, so that larger is better."""
    bars = []
    for (side, size), most in LATTICE.items():
        for row in _ours(rows, lattice.KERNEL, side, D=size):
            standard = _ours(rows, lattice.KERNEL, lattice.STANDARD, **row["size"])
            measured = standard[0]["milliseconds"] / row["milliseconds"] if standard else None
            what = f"{side.removeprefix('ours, ')} against standard attention, {size_text(row['size'])}"
            bars.append(Bar(what, measured, round(1.0 / most, 3), "times as fast", PROJECT_GOAL))
    return bars


def bandwidth_bars(rows: Sequence[Row], copy: float | None) -> list[Bar]:
    """Fractions of the copy bandwidth (TB/s) measured in the same run; a target per measured size."""
    bars = []
    for kernel, fraction in COPY_FRACTIONS.items():
        found = _ours(rows, kernel) if copy else []
        for row in found:
            assert copy is not None
            what = f"{kernel}, {row['side']}, {size_text(row['size'])}"
            bars.append(Bar(what, row["tera_per_second"] / copy, fraction, "of copy", PROJECT_GOAL))
        if not found:
            bars.append(Bar(kernel, None, fraction, "of copy", PROJECT_GOAL))
    return bars


def adam_bars(rows: Sequence[Row]) -> list[Bar]:
    """Our AdamW relative to torch's fused AdamW on the same parameters, with float32 gradients on both sides."""
    bars = []
    for row in _ours(rows, "AdamW"):
        if row["side"] != "ours, float32":
            continue
        theirs = [r for r in rows if r["kernel"] == "AdamW" and r["side"] == TORCH_ADAM and r["size"] == row["size"]]
        times = [r["milliseconds"] for r in theirs if r["milliseconds"] is not None]
        measured = times[0] / row["milliseconds"] if times else None
        what = f"AdamW against {TORCH_ADAM}, {size_text(row['size'])}"
        bars.append(Bar(what, measured, ADAM_OVER_TORCH, "times as fast", PROJECT_GOAL))
    return bars or [Bar(f"AdamW against {TORCH_ADAM}", None, ADAM_OVER_TORCH, "times as fast", PROJECT_GOAL)]


def product_bars(rows: Sequence[Row]) -> list[Bar]:
    """Our linear layers relative to the fastest alternative in the same run: ours without epilogues, or PyTorch's."""
    bars = []
    for kernel in PRODUCTS:
        found = _ours(rows, kernel, "ours")
        for row in found:
            same = [r for r in rows if (r["kernel"], r["size"]) == (kernel, row["size"]) and r is not row]
            times = [r["milliseconds"] for r in same if r["milliseconds"] is not None]
            measured = min(times) / row["milliseconds"] if times else None
            what = f"{kernel} against the fastest other way, {size_text(row['size'])}"
            bars.append(Bar(what, measured, PRODUCTS_OVER_OTHERS, "times as fast", PROJECT_GOAL))
        if not found:
            what = f"{kernel} against the fastest other way"
            bars.append(Bar(what, None, PRODUCTS_OVER_OTHERS, "times as fast", PROJECT_GOAL))
    return bars


def all_bars(rows: Sequence[Row], ceilings: Mapping[str, float | None], card: str) -> list[Bar]:
    """All targets, in the order of the table."""
    found = attention_bars(rows, card) + lattice_bars(rows) + adam_bars(rows) + product_bars(rows)
    return found + bandwidth_bars(rows, ceilings.get("copy_terabytes"))


def size_text(size: Mapping[str, Any]) -> str:
    """B=16 T=1024 …"""
    return " ".join(f"{name}={value}" for name, value in size.items())
