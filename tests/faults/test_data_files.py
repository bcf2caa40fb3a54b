"""Data that changes under a training run, and files that are not what they seem: one line each, nothing lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import Config, from_dict
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError

pytestmark = pytest.mark.slow

CONTEXT = 8


def opened(source: Path, cache: Path, **changes: Any) -> Dataset:
    settings = {"tokenizer": "bytes", "validation_fraction": 0.1, "seed": 1, "cache_folder": cache, "context": CONTEXT}
    return open_dataset(str(source), **(settings | changes))


def small(steps: int) -> Config:
    return from_dict(
        {
            "model": {"size": "custom", "layers": 1, "heads": 1, "width": 8, "context": CONTEXT},
            "training": {"steps": steps, "batch": 2, "evaluate_every": 0, "evaluation_batches": 2, "workers": 1},
            "schedule": {"warmup_steps": 0},
        }
    )


def shrink(path: Path) -> None:
    os.truncate(path, 600)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(700)
        file.write(b"\xff" * 400)


DAMAGE: dict[str, Callable[[Path], None]] = {"shrunk": shrink, "grown": grow, "overwritten": overwrite}
HEADER = np.array([20240520, 1, 3000] + [0] * 253, dtype="<i4").tobytes()


def make(kind: str, folder: Path) -> tuple[Path, Path]:
    """A source of tokens of a kind, and its file with the training tokens."""
    if kind == "llm.c":
        ids = np.random.default_rng(1).integers(0, 257, 3000).astype("<u2")
        (folder / "train_0.bin").write_bytes(HEADER + ids.tobytes())
        (folder / "x_val_0.bin").write_bytes(HEADER + ids.tobytes())
        return folder, folder / "train_0.bin"
    (folder / "text.txt").write_text("".join(f"{n} times {n} is {n * n}\n" for n in range(300)))
    opened(folder / "text.txt", folder / "cache")
    return folder / "text.txt", next((folder / "cache").glob("tokens-*/train.tokens"))


@pytest.mark.parametrize("kind", ["own shards", "llm.c"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_data_that_changes_while_training(kind: str, damage: str, tmp_path: Path) -> None:
    """The run ends in one line, with a checkpoint of the last step whose data was sound."""
    tried, short = 0, []
    for at in (1, 2, 5, 9, 14):
        folder = tmp_path / str(at)
        folder.mkdir()
        source, file = make(kind, folder)
        changes = {"tokenizer": "bytes"}
        trainer = Trainer(small(20), get_backend("numpy", workers=1), opened(source, folder / "cache", **changes),
                          folder=folder / "run")  # fmt: skip
        trainer.initialise()

        def step(record: dict[str, Any], at: int = at, file: Path = file) -> None:
            if record["step"] == at:
                DAMAGE[damage](file)

        trainer.reporter.step = step  # type: ignore[method-assign]
        tried += 1
        try:
            trainer.train()
            short.append((at, "it went on"))
        except UserError as error:
            saved = load_checkpoint(folder / "run").step
            if saved != at or "changed while it was in use" not in str(error) or "\n" in str(error):
                short.append((at, f"{saved}: {error}"))
        finally:
            trainer.close()
    print(f"{kind} {damage} while training: {tried} tried, {len(short)} fell short")
    assert not short


def test_a_shard_that_is_only_touched_goes_on(tmp_path: Path) -> None:
    source, file = make("own shards", tmp_path)
    train = opened(source, tmp_path / "cache").train
    before = train.read(0, 50).tolist()
    for _ in range(5):
        os.utime(file)
        assert train.read(0, 50).tolist() == before
