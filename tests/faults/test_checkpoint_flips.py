"""Flipped bits and truncations over every file of a small run's newest checkpoint: never a silently wrong weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_gpu.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cllm_gpu.utils.errors import UserError

pytestmark = pytest.mark.slow
FLIPS, CUTS = 400, 40
"""Of each file."""


def make(step: int) -> Checkpoint:
    weights = {"w": np.random.default_rng(step).standard_normal((8, 16), dtype=np.float32)}
    return Checkpoint({}, {}, {}, step, {"step": step}, weights, {"first_moment": {"w": -weights["w"]}})


def same(found: Checkpoint, wanted: Checkpoint) -> bool:
    moments = (found.optimizer["first_moment"]["w"], wanted.optimizer["first_moment"]["w"])
    weights = (found.parameters["w"], wanted.parameters["w"])
    return found.state == wanted.state and all(a.tobytes() == b.tobytes() for a, b in (weights, moments))


def test_every_flip_and_truncation_falls_back_or_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        folder = save_checkpoint(tmp_path, make(step), keep_last=2, best=False)
    random = np.random.default_rng(13)
    tried, short = 0, []
    for path in sorted(folder.iterdir()):
        sound = path.read_bytes()
        damages = [
            (int(n), int(b))
            for n, b in zip(random.integers(len(sound), size=FLIPS), random.integers(8, size=FLIPS), strict=True)
        ]
        damaged = [sound[:n] + bytes([sound[n] ^ 1 << b]) + sound[n + 1 :] for n, b in damages]
        damaged += [sound[: int(n)] for n in random.integers(len(sound), size=CUTS)]
        for content in damaged:
            path.write_bytes(content)
            tried += 1
            found = load_checkpoint(tmp_path)
            if not (same(found, make(1)) and len(found.passed_over) == 1 and "\n" not in found.passed_over[0]):
                short.append(path.name)
            try:
                load_checkpoint(folder)
                short.append(path.name)
            except UserError:
                pass
        path.write_bytes(sound)
    assert same(load_checkpoint(tmp_path), make(2))
    print(f"{tried} damaged files tried, {len(short)} fell short")
    assert not short
