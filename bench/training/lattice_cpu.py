"""Measures the cost of crystalline attention in a training step on a CPU; writes bench/results/lattice_cpu.json.

    python -m bench.training.lattice_cpu [--rounds 20] [--steps 5] [--workers 2]
    python -m bench.training.lattice_cpu --tokenizer stdlib-8192.json      writes bench/results/lattice_cpu_bpe.json

The mini model, native backend, batch 16, on the standard library as bytes or with another tokenizer: with standard
attention, with each kind of term alone, and with several. All models train in one process, alternating after a few
steps each on the same batches, so that other load affects all of them equally; every other round has the reverse order.
The cost is the ratio of the median step times; the ratio of processor times, which other load affects less, is reported
too. The target applies to the step time with matches, alone or with the same token; the other rows are for information.
Exit status 1 if the target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from bench.host import load, machine
from bench.paths import RESULTS
from bench.training.cpu_process import Ours
from bench.training.turns import take_turns
from cllm_gpu.config import ModelConfig
from cllm_gpu.data import Batches, open_dataset
from cllm_gpu.data.tokenizers import load_tokenizer
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.library_cache import cache_directory

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
    """A model to train, in the form that `cpu_process.Ours` takes."""

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
        """Sequence length in tokens."""
        return self.architecture().context


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    """The times in milliseconds, rounded."""
    return {name: round(1e3 * median, 3) for name, median in seconds.items()}


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """The times relative to standard attention."""
    return {name: round(median / seconds[STANDARD], 4) for name, median in seconds.items()}


def measure(tokenizer: str, rounds: int, steps: int, workers: int) -> dict[str, Any]:
    """The result file's content. Raises UserError if the tokenizer cannot be read."""
    load_before = load()
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
    wall, busy = take_turns(sides, lambda _, step: batches.batch(step), rounds, steps=steps, warmup=WARMUP)
    costs = ratios(wall)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine() | {"load_before": load_before},
        "backend": sides[STANDARD].description,
        "workers": workers,
        "model": models[STANDARD].architecture().as_dict(),
        "batch": BATCH,
        "data": data.train.name,
        "vocabulary": data.tokenizer.vocabulary,
        "rounds": rounds,
        "steps_per_round": steps,
        "step_milliseconds": milliseconds(wall),
        "ratio_to_standard": costs,
        "processor_milliseconds": milliseconds(busy),
        "processor_ratio_to_standard": ratios(busy),
        "bar": BAR,
        "bar_met": all(costs[name] <= BAR for name in WITH_A_BAR),
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of each model in a round")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", default=BYTES, help="bytes, or a tokenizer.json trained on the standard library")
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
