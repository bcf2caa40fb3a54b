"""Compares loss curves of bf16 and float32 over several seeds; writes bench/results/precision.json and precision.png.

    python -m bench.training.precision [--steps 1000] [--seeds 1,2,3,4,5]

A small model trains on the bytes of the standard library with the numpy backend, one thread, in fp32, in bf16 with
float32 master weights, and in bf16 without. A seed determines weights and batches, so runs of one seed differ only in
precision. The target, at every evaluation: the mean over seeds of a bf16 loss is no further from that of fp32 than the
lowest and highest seed of fp32 are apart. Exit status 1 if it is missed. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.host import processor
from bench.paths import RESULTS
from cllm_gpu.backend import get_backend
from cllm_gpu.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.files import write_atomically
from cllm_gpu.utils.library_cache import cache_directory
from cllm_gpu.utils.versions import environment, package_version

MODEL = ModelConfig(size="tiny", context=32, attention="standard")
BATCH, EVALUATIONS = 8, 10
FP32, MODES = "fp32", ("fp32", "bf16", "bf16 without masters")


class Curve:
    """A reporter that records the losses of steps and evaluations."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.validation: list[float] = []

    def step(self, record: dict[str, Any]) -> None:
        """Record a training loss."""
        self.training.append(record["loss"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Record a validation loss."""
        self.validation.append(record["loss"])

    def message(self, text: str) -> None:
        """Abort: the only message would be that a step was skipped."""
        raise SystemExit(text)


def configuration(mode: str, steps: int, seed: int) -> Config:
    """The configuration of a run in one of the modes."""
    return Config(
        model=MODEL,
        optimizer=OptimizerConfig(weight_decay=0.1, master_weights=mode != MODES[2]),
        schedule=ScheduleConfig(warmup_steps=min(50, steps // 4)),
        training=TrainingConfig(
            steps=steps, batch=BATCH, seed=seed, evaluate_every=max(1, steps // EVALUATIONS), evaluation_batches=40
        ),
        precision="fp32" if mode == FP32 else "bf16",
    )


def run(mode: str, steps: int, seed: int, dataset: Dataset) -> dict[str, Any]:
    """Train one run. Returns its curves: training loss averaged over each tenth of the steps, and validation loss."""
    config, curve = configuration(mode, steps, seed), Curve()
    backend = get_backend("numpy", workers=1, precision=config.precision)
    trainer = Trainer(config, backend, dataset, reporter=curve)
    trainer.initialise()
    started = time.process_time()
    trainer.train()
    trainer.close()
    seconds = time.process_time() - started
    print(f"{mode}, seed {seed}: loss {curve.validation[-1]:.4f}, {seconds:.0f} s", file=sys.stderr)
    windows = np.array_split(np.array(curve.training), EVALUATIONS)
    means = [float(window.mean()) for window in windows]
    return {"mode": mode, "seed": seed, "training": means, "validation": curve.validation}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For each evaluation: spread of fp32 over seeds, and distance of each mode from fp32 (means, worst pair)."""
    curves = {mode: np.array([r["validation"] for r in runs if r["mode"] == mode]) for mode in MODES}
    spread = np.ptp(curves[FP32], axis=0)
    found: dict[str, Any] = {"spread": spread.tolist(), "modes": {}}
    for mode, losses in curves.items():
        distance = np.abs(losses.mean(axis=0) - curves[FP32].mean(axis=0))
        found["modes"][mode] = {
            "last": losses[:, -1].tolist(),
            "distance_of_means": distance.tolist(),
            "largest_share_of_spread": float(np.max(distance / spread)),
            "largest_pair": float(np.abs(losses - curves[FP32]).max()),
        }
    return found


def draw(runs: list[dict[str, Any]], steps: list[int], path: Path) -> None:
    """Plot validation loss minus the mean of fp32: a line per run, and a band over the seeds of fp32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    standard = np.array([r["validation"] for r in runs if r["mode"] == FP32])
    middle = standard.mean(axis=0)
    axes.fill_between(steps, standard.min(axis=0) - middle, standard.max(axis=0) - middle, color="0.88", lw=0)
    for mode, colour in zip(MODES, ("0.45", "#0067b1", "#c8501e"), strict=True):
        for number, losses in enumerate(r["validation"] for r in runs if r["mode"] == mode):
            axes.plot(steps, np.array(losses) - middle, color=colour, lw=1.2, label=None if number else mode)
    axes.set(xlabel="step", ylabel="validation loss − mean of fp32 (nats/byte)")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> int:
    """Train, write the results, and print whether the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    cache = cache_directory() / "data"
    dataset = open_dataset(
        "stdlib", tokenizer="bytes", validation_fraction=0.05, seed=1, cache_folder=cache, context=MODEL.context or 0
    )
    runs = [run(mode, options.steps, seed, dataset) for seed in seeds for mode in MODES]
    every = configuration(FP32, options.steps, 1).training.evaluate_every
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), **environment(), "ml_dtypes": package_version("ml_dtypes")},
        "model": dataclasses.asdict(MODEL.architecture(dataset.vocabulary)),
        "batch": BATCH,
        "steps": [min(options.steps, every * (n + 1)) for n in range(len(runs[0]["validation"]))],
        "seeds": seeds,
        **summary(runs),
        "runs": runs,
    }
    write_atomically(RESULTS / "precision.json", (json.dumps(found) + "\n").encode())
    draw(runs, found["steps"], RESULTS / "precision.png")
    missed = [mode for mode, row in found["modes"].items() if not (row["largest_share_of_spread"] <= 1.0)]
    for mode, row in found["modes"].items():
        loss, share, pair = statistics.fmean(row["last"]), row["largest_share_of_spread"], row["largest_pair"]
        print(
            f"{mode}: last loss {loss:.4f}; at most {share:.2f} of the spread from fp32, {pair:.4f} from the same seed"
        )
    print(f"missed by {', '.join(missed)}" if missed else "met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
