"""Measures the effect of recompute levels and batch size on a CPU training step; writes bench/results/recompute.json.

    python -m bench.training.recompute [--rounds 10] [--workers 2]

The mini model with standard attention, native backend, whole steps (gradients, clipping, AdamW). First the levels at
batch 16: step time, and the bytes of the activations, which are planned and allocated exactly. Then, without
recomputation, batches of 1 to 32 sequences per worker: tokens per second. The configurations alternate step by step,
with the order reversed in every other round, so that other load affects all of them equally. Ratios are of medians; the
processor time, which other load affects less, is reported too. The costs on a GPU depend on its kernels and are not
measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.host import load, machine
from bench.paths import RESULTS
from bench.training.cpu_process import Ours
from bench.training.turns import take_turns
from cllm_gpu.backend import get_backend
from cllm_gpu.config import ModelConfig
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.recompute import LEVELS, Recompute
from cllm_gpu.training.data_parallel import workers_plan

RESULT = RESULTS / "recompute.json"
BATCH, VOCABULARY = 16, 257
PER_WORKER = (1, 2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """The mini model with a batch size, in the form that `cpu_process.Ours` takes."""

    batch: int
    vocabulary: int = VOCABULARY

    def architecture(self) -> Architecture:
        """The mini model."""
        return ModelConfig(size="mini", attention="standard").architecture(self.vocabulary)

    @property
    def length(self) -> int:
        """Sequence length in tokens."""
        return self.architecture().context


def time_steps(sides: dict[str, Ours], sizes: dict[str, int], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """`take_turns` with random tokens. sizes: batch size of each side."""
    generator, length = np.random.default_rng(1), Contestant(1).length

    def batch_of(name: str, _: int) -> tuple[Any, Any]:
        tokens = generator.integers(VOCABULARY, size=(sizes[name], length), dtype=np.int32)
        return tokens, tokens

    return take_turns(sides, batch_of, rounds)


def levels(rounds: int, workers: int) -> dict[str, Any]:
    """Step time and size of the activations at every recompute level, with batch 16."""
    contestant = Contestant(BATCH)
    a, backend = contestant.architecture(), get_backend("native", workers=workers)
    layout = Layout(parameter_specs(a), np.float32)
    sides: dict[str, Ours] = {level: Ours(contestant, "native", workers, level) for level in LEVELS}
    wall, busy = time_steps(sides, dict.fromkeys(sides, BATCH), rounds)

    def activations(level: Recompute) -> int:
        return workers_plan(a, backend, layout, BATCH, a.context, recompute=level).activations

    return {
        level: {
            "milliseconds": round(1e3 * wall[level], 3),
            "ratio": round(wall[level] / wall["none"], 4),
            "processor_ratio": round(busy[level] / busy["none"], 4),
            "activation_bytes": activations(level),
        }
        for level in LEVELS
    }


def batches(rounds: int, workers: int) -> dict[str, Any]:
    """Tokens per second by the number of sequences per worker."""
    sizes = {str(count): count * workers for count in PER_WORKER}
    sides = {name: Ours(Contestant(batch), "native", workers) for name, batch in sizes.items()}
    wall, busy = time_steps(sides, sizes, rounds)
    length = Contestant(1).length
    return {
        name: {
            "tokens_per_second": round(batch * length / wall[name]),
            "tokens_per_processor_second": round(batch * length / busy[name]),
        }
        for name, batch in sizes.items()
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    load_before = load()
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_before": load_before},
        "backend": get_backend("native", workers=options.workers).products,
        "workers": options.workers,
        "rounds": options.rounds,
        "model": Contestant(BATCH).architecture().as_dict(),
        "batch": BATCH,
        "levels": levels(options.rounds, options.workers),
        "sequences_per_worker": batches(options.rounds, options.workers),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps({name: report[name] for name in ("levels", "sequences_per_worker")}, indent=1))


if __name__ == "__main__":
    main()
