"""Variants of one configuration, each trained from several seeds: what a change of the model is worth, and how surely.

An experiment is a TOML file: the sections of a configuration, which all variants share, and besides

    title = "…"
    seeds = [1, 2, 3]                     # of the weights and the batches; the split of the data stays
    [[variants]]
    name = "standard"                     # the first is what the others are measured against
    [[variants]]
    name = "matches"
    model.attention = "crystalline"       # whatever differs, by the names of the configuration

Every variant trains on the same batches for a seed, so differences are taken seed by seed. Each run is kept in
runs.json as soon as it is done: an experiment that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.finetune import initial_configuration
from cllm_gpu.config import Config, as_dict, from_dict
from cllm_gpu.config_aliases import in_full
from cllm_gpu.data import Dataset
from cllm_gpu.experiments.run_in_memory import CurveRecorder, Point
from cllm_gpu.training.metrics import clipped
from cllm_gpu.training.signals import Stopped
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, write_atomically

RUNS = "runs.json"


@dataclass(frozen=True)
class Experiment:
    """What is to be trained."""

    title: str
    seeds: tuple[int, ...]
    base: Config
    changes: tuple[tuple[str, dict[str, Any]], ...]
    """Name of each variant, and what differs from the base, as nested plain data."""

    def variants(self, base: Config | None = None) -> list[tuple[str, Config]]:
        """Name and configuration of every variant, over `base` (None: the experiment's own). UserError for bad ones."""
        values = as_dict(base or self.base)
        found = []
        for name, changes in self.changes:
            try:
                found.append((name, from_dict(_merged(values, in_full(changes)))))
            except UserError as error:
                raise UserError(f"variant {name!r}: {error}") from None
        return found


@dataclass(frozen=True)
class SeedRun:
    """One variant trained from one seed."""

    variant: str
    seed: int
    points: tuple[Point, ...]
    """Evaluations, the last after the last step."""
    parameters: int
    step_seconds: float
    """Median over the steps."""
    scalars: dict[str, list[list[float]]]
    """The lattice's scalars at the end, by layer: (heads, terms)."""
    stopped: str | None = None
    """Why the run ended early; None where it did not."""
    skipped: int | None = None
    """Steps whose gradient was refused; None in runs kept before these were counted."""
    clipped: int | None = None
    """Steps whose gradient was scaled down to `optimizer.clip_norm`; None as above."""

    @property
    def loss(self) -> float:
        """Validation loss after the last step, nats per token; inf where there is none."""
        return self.points[-1].loss if self.points and self.stopped is None else math.inf


@dataclass(frozen=True)
class Summary:
    """A variant over its seeds."""

    variant: str
    parameters: int
    losses: tuple[float, ...]
    """By seed."""
    gains: tuple[float, ...]
    """Loss of the first variant minus this one's, seed by seed."""
    step_ratio: float
    """Median seconds of a step over the first variant's, seed by seed, and of those the median."""
    step_seconds: float

    @property
    def loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def gain(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.gains)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n − 1); 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def load_experiment(path: Path) -> Experiment:
    """Read an experiment's TOML file. UserError, one line, when it cannot be used."""
    try:
        with clear_errors("read", path):
            values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    title, seeds, variants = (values.pop(name, None) for name in ("title", "seeds", "variants"))
    if not isinstance(title, str):
        raise UserError(f'{path}: title is missing; write title = "…"')
    try:
        base = from_dict(values)
        if base.initial is not None:
            base = from_dict(values, initial_configuration(base.initial))
        experiment = Experiment(title, checked_seeds(seeds, "seeds"), base, _changes(variants))
        experiment.variants()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return experiment


def checked_seeds(seeds: Any, name: str) -> tuple[int, ...]:
    """The seeds of an experiment. UserError, with the name of where they stand, for what are none."""
    listed = seeds if isinstance(seeds, list | tuple) else ()
    if not listed or not all(type(seed) is int and seed >= 0 for seed in listed):
        raise UserError(f"{name} must be a list of whole numbers of at least 0, such as [1, 2, 3]")
    if len(set(listed)) < len(listed):
        raise UserError(f"a seed stands twice in {name}")
    return tuple(listed)


def _changes(variants: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    if not isinstance(variants, list) or not variants or not all(isinstance(v, dict) for v in variants):
        raise UserError("there are no variants; write a [[variants]] section for each")
    names = [variant.pop("name", None) for variant in variants]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError('a variant has no name; write name = "…" in each [[variants]] section')
    if len(set(names)) < len(names):
        raise UserError(f"two variants are called {next(name for name in names if names.count(name) > 1)!r}")
    return tuple(zip(names, variants, strict=True))


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, change in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged


# ---- running


def run_variant(name: str, config: Config, backend: Backend, dataset: Dataset) -> SeedRun:
    """Train `config` from its seed, in memory. Stopped when a signal asks to stop."""
    recorder = _Recorder(config.optimizer.clip_norm)
    trainer = Trainer(config, backend, dataset, reporter=recorder)
    stopped = None
    try:
        trainer.initialise()
        outcome = trainer.train()
        if outcome.interrupted:
            raise Stopped(outcome.signal)
        scalars = {
            group: backend.to_host(view).tolist()
            for group, view in trainer.parameters.items()
            if trainer.layout.specs[group].scalars
        }
    except UserError as error:
        stopped, scalars = str(error), {}
    finally:
        trainer.close()
    seconds = statistics.median(recorder.seconds) if recorder.seconds else math.nan
    points = tuple(recorder.points)
    return SeedRun(
        name, config.training.seed, points, trainer.layout.count, seconds, scalars, stopped,
        skipped=recorder.skipped, clipped=recorder.clipped,
    )  # fmt: skip


class _Recorder(CurveRecorder):
    """Keeps the seconds of every step too, and counts the steps that were skipped or clipped."""

    def __init__(self, clip_norm: float) -> None:
        super().__init__()
        self._clip_norm = clip_norm
        self.seconds: list[float] = []
        self.skipped = self.clipped = 0

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        self.seconds.append(record["seconds"])
        self.skipped += record["skipped"] is not None
        self.clipped += clipped(record, self._clip_norm)


def run_experiment(
    experiment: Experiment,
    base: Config,
    folder: Path,
    run: Callable[[str, Config], SeedRun],
    report: Callable[[SeedRun, bool], None] = lambda run, known: None,
) -> list[SeedRun]:
    """Every variant from every seed, seed by seed; those that `folder` has already are taken from there.

    `report` is told of every run, and whether it was known. UserError where the folder cannot be used.
    """
    kept = _Kept(folder / RUNS)
    done = []
    for name, config in _planned(experiment, base):
        found = kept.find(name, config)
        known = found is not None
        if found is None:
            found = run(name, config)
            kept.add(found, config)
        done.append(found)
        report(found, known)
    return done


def _planned(experiment: Experiment, base: Config) -> Iterator[tuple[str, Config]]:
    for seed in experiment.seeds:
        for name, config in experiment.variants(base):
            yield name, dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


class _Kept:
    """The runs done so far, in a file; a run counts as done only for the very configuration it was made with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[dict[str, Any]] = []
        if path.exists():
            try:
                with clear_errors("read", path):
                    self._entries = exact_json.loads(path.read_bytes())["runs"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path} is not a list of runs; give another --output, or move it away") from None

    def find(self, name: str, config: Config) -> SeedRun | None:
        """The run of this configuration, under its present name."""
        for entry in self._entries:
            if entry["config"] == _identity(config):
                values = entry["run"]
                points = tuple(Point(**point) for point in values["points"])
                return SeedRun(**values | {"points": points, "variant": name})
        return None

    def add(self, run: SeedRun, config: Config) -> None:
        """Keep a run, on disk."""
        self._entries.append({"config": _identity(config), "run": dataclasses.asdict(run)})
        write_atomically(self._path, exact_json.dumps({"runs": self._entries}, indent=1) + "\n")


def _identity(config: Config) -> dict[str, Any]:
    """What a run's numbers depend on: not where it is written, nor what is printed at its end."""
    values = as_dict(dataclasses.replace(config, output=None))
    values["training"] |= {"sample_tokens": 0, "sample_prompt": None}
    for name in ("sample_every", "diagnose_every", "tensorboard"):
        del values["training"][name]
    if values["model"]["attention"] == "standard":
        del values["model"]["lattice"], values["optimizer"]["lattice_rate"]
    for section, name in ((values, "initial"), (values["model"], "vocabulary")):
        if section[name] is None:  # runs kept before there was such a setting are still these
            del section[name]
    return exact_json.loads(exact_json.dumps(values))


# ---- what came of it


def summarise(experiment: Experiment, runs: Sequence[SeedRun]) -> list[Summary]:
    """A summary of every variant, in the order of the experiment."""
    by_key = {(run.variant, run.seed): run for run in runs}
    names = [name for name, _ in experiment.changes]
    first = [by_key[names[0], seed] for seed in experiment.seeds]
    summaries = []
    for name in names:
        own = [by_key[name, seed] for seed in experiment.seeds]
        pairs = list(zip(first, own, strict=True))
        summaries.append(
            Summary(
                name,
                own[0].parameters,
                tuple(run.loss for run in own),
                tuple(baseline.loss - run.loss for baseline, run in pairs),
                float(np.median([run.step_seconds / baseline.step_seconds for baseline, run in pairs])),
                float(np.median([run.step_seconds for run in own])),
            )
        )
    return summaries
