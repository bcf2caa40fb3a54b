"""Training beside PyTorch: whether both sides trained alike, and whether measured rows reach what they are meant to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.kernels.targets import HOUSE, Bar

Row = Mapping[str, Any]
"""As `training_sides.measure_side` makes it."""
TABLES = "---- results"
"""The line between what is printed while it is measured and the tables."""
SPEED = {"124M": 1.1, "350M": 1.1, "10M": 2.0}
"""Times PyTorch's tokens/s, each at its own best batch."""
MEMORY = 0.9
"""Of PyTorch's memory at the same batch."""
TOKENS_PER_SECOND, TOKENS_SIZE, TOKENS_CARD = 500_000, "124M", "H200"
START = 0.05
"""|first loss − ln V| / ln V: the start's logits are small, not zero; wider models have larger ones."""
ALIKE = 0.02
"""|ours − theirs| / theirs over the first steps: bf16 rounds by up to 2^-8, at different places on the two sides, and
Adam's first steps take the sign of the smallest gradient too."""


def best(rows: Iterable[Row], side: str, size: str) -> Row | None:
    """The row of the fastest batch of one side; None if nothing was timed as it is meant to be, without a note."""
    mine = [r for r in rows if (r["side"], r["size"]) == (side, size) and not r["note"]]
    timed = [r for r in mine if r["tokens_per_second"] is not None]
    return max(timed, key=lambda row: row["tokens_per_second"], default=None)


def training_bars(rows: Sequence[Row], card: str) -> list[Bar]:
    """Speed and memory against PyTorch, and tokens/s on the card they are meant for."""
    bars = [_speed_bar(rows, size, required) for size, required in SPEED.items()]
    bars += [_memory_bar(rows, size) for size in SPEED]
    if TOKENS_CARD in card:
        found = best(rows, "ours", TOKENS_SIZE)
        measured = None if found is None else found["tokens_per_second"] / 1e3
        bars.append(Bar(f"{TOKENS_SIZE} at its best batch", measured, TOKENS_PER_SECOND / 1e3, "k tokens/s", HOUSE))
    return bars


def _speed_bar(rows: Sequence[Row], size: str, required: float) -> Bar:
    ours, theirs = best(rows, "ours", size), best(rows, "PyTorch", size)
    if ours is None or theirs is None:
        return Bar(f"{size} against PyTorch", None, required, "times as fast", HOUSE)
    what = f"{size} against PyTorch, B={ours['batch']} and B={theirs['batch']}"
    return Bar(what, ours["tokens_per_second"] / theirs["tokens_per_second"], required, "times as fast", HOUSE)


def _memory_bar(rows: Sequence[Row], size: str) -> Bar:
    """At the largest batch that both have; inverted, so that more is better as everywhere."""
    sound = [r for r in rows if r["size"] == size and r["held_bytes"] and not r["note"]]
    held = {(r["side"], r["batch"]): r["held_bytes"] for r in sound}
    both = [batch for side, batch in held if side == "ours" and ("PyTorch", batch) in held]
    what, unit = f"PyTorch's memory over ours, {size}", "times ours"
    if not both:
        return Bar(what, None, round(1 / MEMORY, 3), unit, HOUSE)
    batch = max(both)
    measured = held["PyTorch", batch] / held["ours", batch]
    return Bar(f"{what}, B={batch}", measured, round(1 / MEMORY, 3), unit, HOUSE)


def trouble(rows: Sequence[Row], vocabularies: Mapping[str, int]) -> list[str]:
    """What must not be: a side failed, does not start at ln V, does not learn, or the two do not go alike."""
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
            found.append(f"{_name(row)}: the loss is not PyTorch's from step {apart[0]} on")
    return found


def _tail(losses: Sequence[float]) -> float:
    """Mean of the last quarter."""
    last = losses[-max(1, len(losses) // 4) :]
    return sum(last) / len(last)


def _name(row: Row) -> str:
    return f"{row['side']}, {row['size']}, B={row['batch']}"
