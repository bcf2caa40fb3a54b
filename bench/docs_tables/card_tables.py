"""The tables of training on a GPU, from the newest result of bench/training/gpt2_training.py; used by fill.py."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bench.paths import RESULTS
from bench.training.roofline import gaps_sentence

NOT_MEASURED = 'Not measured: `make gpu-check ARGS="--only training"` has not been run on a GPU yet.'


def newest_result() -> dict[str, Any] | None:
    """The most recent result; None if there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("gpt2_training-*.json")]
    return max(found, key=lambda result: result["machine"]["date"], default=None)


def training() -> str:
    """Both sides at every batch size, the targets, and the kernels of a step by class."""
    found = newest_result()
    if found is None:
        return NOT_MEASURED
    machine = found["machine"]
    lines = [*_rows(found["rows"]), "", *_bars(found["bars"])]
    if found["profile"] is not None and found["profile"]["rows"]:
        lines += ["", *_profile(found["profile"])]
    made = f"{machine['card']}, driver {machine['driver']}, CuPy {machine['cupy']}, {machine['beside']}"
    return "\n".join([*lines, "", f"{made}; commit {machine['commit']}, {machine['date'][:10]}."])


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| model | B | side | tokens/s | MFU | memory | W | J/token | note |",
        "|---|--:|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        gigabytes = None if row["held_bytes"] is None else row["held_bytes"] / 1e9
        cells = [
            row["size"],
            str(row["batch"]),
            row["side"],
            _cell(row["tokens_per_second"], ",.0f"),
            _cell(row["mfu"], ".1%"),
            "–" if gigabytes is None else f"{gigabytes:.1f} GB",
            _cell(row["watts"], ".0f"),
            _cell(row["joules_per_token"], ".3g"),
            row["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bars(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| target | measured | required | verdict |", "|---|--:|--:|---|"]
    for bar in bars:
        cells = [bar["what"], _cell(bar["measured"], ".3g"), f"{bar['required']:g} {bar['unit']}", bar["verdict"]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _profile(profile: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| {profile['size']}, B={profile['batch']}: class of kernel | launches | TFLOP | GB | least ms | ms | "
        "times the least |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in profile["rows"]:
        cells = [
            row["class"],
            f"{row['launches']:g}",
            _cell(row["teraflop"], ".3g"),
            _cell(row["gigabytes"], ".3g"),
            _cell(row["least_milliseconds"], ".2f"),
            _cell(row["milliseconds"], ".2f"),
            _cell(row["times_the_least"], ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    said = gaps_sentence(profile["gaps"])
    return [*lines, "", f"{said[0].upper()}{said[1:]}."]
