"""What crystalline attention costs a training step on a CPU: writes bench/results/lattice_cpu.json.

    python bench/lattice_cpu.py [--rounds 20] [--steps 5] [--workers 2]

The mini model, native backend, batch 16, the standard library's bytes: with standard attention, and with translation
matches of several orders, with and without the term for the same token. All train in one process and take turns, a few
steps each on the same batches, so that whatever else the machine does falls on all alike; every other round goes
through them backwards. A cost is the ratio of the medians of all steps; beside it stands the same of processor time,
which a busy machine disturbs less. The bar is for the time of a step with matches; the row with the distances as well
is there to be known. Exit status 1 where the bar is missed.
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
from cllm_gpu.versions import environment, package_version

RESULT = Path(__file__).parent / "results" / "lattice_cpu.json"
BATCH, BAR, WARMUP = 16, 1.10, 3
STANDARD, ALL_TERMS = "standard", "all terms"
ORDERS = (1, 3, 8)


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


def contestants(vocabulary: int) -> dict[str, Contestant]:
    """All of them, by name."""
    terms: dict[str, LatticeTerms | None] = {STANDARD: None}
    for order in ORDERS:
        terms[f"matches {order}"] = LatticeTerms(matches=order, same_token=False)
        terms[f"matches {order}, same token"] = LatticeTerms(matches=order, same_token=True)
    terms[ALL_TERMS] = LatticeTerms(matches=ORDERS[-1], same_token=True, distance=True, prime_distance=True)
    return {name: Contestant(lattice, vocabulary) for name, lattice in terms.items()}


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


def measure(rounds: int, steps: int, workers: int) -> dict[str, Any]:
    """The whole report."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    data = open_dataset(
        "stdlib", tokenizer="bytes", validation_fraction=0.05, seed=1, cache_folder=cache_directory(), context=1024
    )
    models = contestants(data.tokenizer.vocabulary)
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
        "rounds": rounds,
        "steps_per_round": steps,
        "step_milliseconds": wall,
        "ratio_to_standard": costs,
        "processor_milliseconds": processor_time,
        "processor_ratio_to_standard": ratios(processor_time),
        "bar": BAR,
        "bar_met": all(ratio <= BAR for name, ratio in costs.items() if name != ALL_TERMS),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of each model in a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    report = measure(options.rounds, options.steps, options.workers)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(f"{'':26}{'step':>13}{'ratio':>9}{'processor':>15}{'ratio':>9}")
    for name, median in report["step_milliseconds"].items():
        busy, busy_ratio = report["processor_milliseconds"][name], report["processor_ratio_to_standard"][name]
        print(f"{name:26}{median:10.2f} ms{report['ratio_to_standard'][name]:8.3f}x{busy:12.2f} ms{busy_ratio:8.3f}x")
    print(f"bar {BAR}x for matches: {'met' if report['bar_met'] else 'missed'}")
    sys.exit(0 if report["bar_met"] else 1)


if __name__ == "__main__":
    main()
