"""What crystalline attention costs a training step on a CPU: writes bench/results/lattice_cpu.json.

    python bench/lattice_cpu.py [--rounds 20] [--steps 5] [--workers 2]
    python bench/lattice_cpu.py --tokenizer stdlib-8192.json      writes bench/results/lattice_cpu_bpe.json

The mini model, native backend, batch 16, the standard library by bytes or by another vocabulary: with standard
attention, with each kind of term alone, and with several. All train in one process and take turns, a few steps each on
the same batches, so that whatever else the machine does falls on all alike; every other round goes through them
backwards. A cost is the ratio of the medians of all steps; beside it stands the same of processor time, which a busy
machine disturbs less. The bar is for the time of a step with matches, alone or with the same token; the other rows are
there to be known. Exit status 1 where the bar is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cpu_side import Ours
from prepare_memory import processor

from cllm_gpu.architecture import Architecture, LatticeTerms
from cllm_gpu.compiler import cache_directory
from cllm_gpu.config import ModelConfig
from cllm_gpu.data import Batches, open_dataset
from cllm_gpu.errors import UserError
from cllm_gpu.tokenizers import load_tokenizer
from cllm_gpu.versions import environment, package_version

RESULTS = Path(__file__).parent / "results"
BYTES = "bytes"
BATCH, BAR, WARMUP = 16, 1.10, 3
STANDARD, ORDERS = "standard", (1, 3, 8)
NONE = LatticeTerms(matches=0, same_token=False)
TERMS: dict[str, LatticeTerms | None] = {
    STANDARD: None,
    "distance": dataclasses.replace(NONE, distance=True),
    "prime distance": dataclasses.replace(NONE, prime_distance=True),
    "symmetry on a quarter": dataclasses.replace(NONE, symmetry_fraction=0.25),
    "same token": dataclasses.replace(NONE, same_token=True),
    **{f"matches to {order}": dataclasses.replace(NONE, matches=order) for order in ORDERS},
    **{f"same token, matches to {order}": LatticeTerms(matches=order, same_token=True) for order in ORDERS},
    "all terms": LatticeTerms(matches=8, same_token=True, distance=True, prime_distance=True, symmetry_fraction=0.25),
}
WITH_A_BAR = tuple(name for name in TERMS if "matches" in name)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A model to train, in the form that `cpu_side` takes."""

    lattice: LatticeTerms | None
    vocabulary: int
    batch: int = BATCH

    def architecture(self) -> Architecture:
        """The mini model with this attention."""
        if self.lattice is None:
            return ModelConfig(size="mini", attention="standard").architecture(self.vocabulary)
        return ModelConfig(size="mini", attention="crystalline", lattice=self.lattice).architecture(self.vocabulary)

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.architecture().context


def take_turns(
    sides: dict[str, Ours], batches: Batches, rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and processor seconds of every step of every side; the first steps of each are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    processor_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):  # the first round warms up
        chosen = range(WARMUP) if number < 0 else range(WARMUP + number * steps, WARMUP + (number + 1) * steps)
        for name in list(sides)[:: -1 if number % 2 else 1]:
            for step in chosen:
                tokens, targets = batches.batch(step)
                start, start_processor = time.perf_counter(), time.process_time()
                sides[name].step(tokens, targets)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - start)
                    processor_seconds[name].append(time.process_time() - start_processor)
        print(f"round {number + 1} of {rounds}", end="\r", file=sys.stderr)
    return seconds, processor_seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds of the median step of each."""
    return {name: round(1e3 * statistics.median(taken), 3) for name, taken in seconds.items()}


def ratios(milliseconds: dict[str, float]) -> dict[str, float]:
    """Each over that of standard attention."""
    return {name: round(median / milliseconds[STANDARD], 4) for name, median in milliseconds.items()}


def measure(tokenizer: str, rounds: int, steps: int, workers: int) -> dict[str, Any]:
    """The whole report; UserError for a tokenizer that cannot be read."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    data = open_dataset(
        "stdlib",
        tokenizer=load_tokenizer(tokenizer),
        validation_fraction=0.05,
        seed=1,
        cache_folder=cache_directory(),
        context=1024,
    )
    models = {name: Contestant(lattice, data.tokenizer.vocabulary) for name, lattice in TERMS.items()}
    sides = {name: Ours(model, "native", workers) for name, model in models.items()}
    batches = Batches(data.train, batch=BATCH, context=models[STANDARD].length, seed=1)
    wall, processor_time = (medians(seconds) for seconds in take_turns(sides, batches, rounds, steps))
    costs = ratios(wall)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**environment(), "processor": processor(), "mkl": package_version("mkl"), "load_before": load},
        "backend": sides[STANDARD].description,
        "workers": workers,
        "model": models[STANDARD].architecture().as_dict(),
        "batch": BATCH,
        "data": data.train.name,
        "vocabulary": data.tokenizer.vocabulary,
        "rounds": rounds,
        "steps_per_round": steps,
        "step_milliseconds": wall,
        "ratio_to_standard": costs,
        "processor_milliseconds": processor_time,
        "processor_ratio_to_standard": ratios(processor_time),
        "bar": BAR,
        "bar_met": all(costs[name] <= BAR for name in WITH_A_BAR),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of each model in a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--tokenizer", default=BYTES, help="bytes, or a tokenizer.json of the standard library's tokens"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    try:
        report = measure(options.tokenizer, options.rounds, options.steps, options.workers)
    except UserError as error:
        sys.exit(f"error: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / ("lattice_cpu.json" if options.tokenizer == BYTES else "lattice_cpu_bpe.json")
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{'':26}{'step':>13}{'ratio':>9}{'processor':>15}{'ratio':>9}")
    for name, median in report["step_milliseconds"].items():
        busy, busy_ratio = report["processor_milliseconds"][name], report["processor_ratio_to_standard"][name]
        print(f"{name:26}{median:10.2f} ms{report['ratio_to_standard'][name]:8.3f}x{busy:12.2f} ms{busy_ratio:8.3f}x")
    print(f"bar {BAR}x for matches: {'met' if report['bar_met'] else 'missed'}")
    sys.exit(0 if report["bar_met"] else 1)


if __name__ == "__main__":
    main()
