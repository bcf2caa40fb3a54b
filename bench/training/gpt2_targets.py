"""Training compared with PyTorch: checks that both sides train alike, and the targets with their measured values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.kernels.targets import PROJECT_GOAL, Bar

Row = Mapping[str, Any]
"""A row as returned by `gpt2_process.measure_side`."""
TABLES = "---- results"
"""The line between progress messages and result tables."""
SPEED = {"124M": 1.1, "350M": 1.1, "10M": 2.0}
"""Target tokens/s relative to PyTorch, each side at its best batch size."""
MEMORY = 0.9
"""Target memory relative to PyTorch at the same batch size."""
TOKENS_PER_SECOND, TOKENS_SIZE, TOKENS_CARD = 500_000, "124M", "H200"
START = 0.05
"""Bound on |first loss − ln V| / ln V: initial logits are small but not zero, and larger in wider models."""
ALIKE = 0.02
"""Bound on |ours − theirs| / theirs over the first steps: the two sides round to bf16 (by up to 2^-8) at different
places, and Adam's first updates depend on the sign of even the smallest gradient."""


def best(rows: Iterable[Row], side: str, size: str) -> Row | None:
    """The row of the fastest batch size of one side; None if no row without a note was timed."""
    mine = [r for r in rows if (r["side"], r["size"]) == (side, size) and not r["note"]]
    timed = [r for r in mine if r["tokens_per_second"] is not None]
    return max(timed, key=lambda row: row["tokens_per_second"], default=None)


def training_bars(rows: Sequence[Row], card: str) -> list[Bar]:
    """Targets for speed and memory relative to PyTorch, and for tokens/s on the GPU they are defined for."""
    bars = [_speed_bar(rows, size, required) for size, required in SPEED.items()]
    bars += [_memory_bar(rows, size) for size in SPEED]
    if TOKENS_CARD in card:
        found = best(rows, "ours", TOKENS_SIZE)
        measured = None if found is None else found["tokens_per_second"] / 1e3
        bars.append(
            Bar(f"{TOKENS_SIZE} at its best batch", measured, TOKENS_PER_SECOND / 1e3, "k tokens/s", PROJECT_GOAL)
        )
    return bars


def _speed_bar(rows: Sequence[Row], size: str, required: float) -> Bar:
    ours, theirs = best(rows, "ours", size), best(rows, "PyTorch", size)
    if ours is None or theirs is None:
        return Bar(f"{size} against PyTorch", None, required, "times as fast", PROJECT_GOAL)
    what = f"{size} against PyTorch, B={ours['batch']} and B={theirs['batch']}"
    return Bar(what, ours["tokens_per_second"] / theirs["tokens_per_second"], required, "times as fast", PROJECT_GOAL)


def _memory_bar(rows: Sequence[Row], size: str) -> Bar:
    """At the largest batch size that both sides have; inverted, so that larger is better as in all targets."""
    sound = [r for r in rows if r["size"] == size and r["held_bytes"] and not r["note"]]
    held = {(r["side"], r["batch"]): r["held_bytes"] for r in sound}
    both = [batch for side, batch in held if side == "ours" and ("PyTorch", batch) in held]
    what, unit = f"PyTorch's memory over ours, {size}", "times ours"
    if not both:
        return Bar(what, None, round(1 / MEMORY, 3), unit, PROJECT_GOAL)
    batch = max(both)
    measured = held["PyTorch", batch] / held["ours", batch]
    return Bar(f"{what}, B={batch}", measured, round(1 / MEMORY, 3), unit, PROJECT_GOAL)


def failures(rows: Sequence[Row], vocabularies: Mapping[str, int]) -> list[str]:
    """Errors: a side failed, its loss does not start at ln V or does not fall, or the losses of the two differ."""
    found = [f"{_name(row)}: {row['note']}" for row in rows if row["note"].startswith("failed")]
    for row in (row for row in rows if row["losses"]):
        losses, start = row["losses"], math.log(vocabularies[row["size"]])
        if not (abs(losses[0] - start) <= START * start):
            found.append(f"{_name(row)}: the first loss is {losses[0]:.4f}, ln V is {start:.4f}")
        if not (_tail(losses) < losses[0]):
            found.append(f"{_name(row)}: the loss does not fall")
    theirs = {(r["size"], r["batch"]): r["losses"] for r in rows if r["side"] == "PyTorch" and r["losses"]}
    for row in (row for row in rows if row["side"] == "ours" and row["losses"]):
        other = theirs.get((row["size"], row["batch"]), row["losses"])
        pairs = enumerate(zip(row["losses"], other, strict=True), start=1)
        apart = [step for step, (a, b) in pairs if not (abs(a - b) <= ALIKE * abs(b))]
        if apart:
            found.append(f"{_name(row)}: the loss differs from PyTorch's from step {apart[0]} on")
    return found


def _tail(losses: Sequence[float]) -> float:
    """Mean of the last quarter of the losses."""
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def _name(row: Row) -> str:
    return f"{row['side']}, {row['size']}, B={row['batch']}"
