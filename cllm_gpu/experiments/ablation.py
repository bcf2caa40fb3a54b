"""Ablations: variants of one configuration, each trained from several seeds, and their gains over the first variant.

An experiment is a TOML file with the sections of a configuration, which all variants share, and

    title = "…"
    seeds = [1, 2, 3]                     # of the weights and the batches; the data split is the same
    [[variants]]
    name = "standard"                     # the first variant is the baseline
    [[variants]]
    name = "matches"
    model.attention = "crystalline"       # settings that differ

For a given seed, all variants train on the same batches, so differences are taken seed by seed. Each finished run is
saved in runs.json: an interrupted experiment resumes where it stopped.
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
    """An experiment: variants to train from several seeds."""

    title: str
    seeds: tuple[int, ...]
    base: Config
    changes: tuple[tuple[str, dict[str, Any]], ...]
    """Name of each variant, and its differences from the base, as nested plain data."""

    def variants(self, base: Config | None = None) -> list[tuple[str, Config]]:
        """Name and configuration of every variant, applied to `base` (None: the experiment's).

        Raises UserError for an invalid variant.
        """
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
    """Evaluations; the last is after the last step."""
    parameters: int
    step_seconds: float
    """Median time of a step."""
    scalars: dict[str, list[list[float]]]
    """Parameter name → the lattice scalars at the end, (heads, terms)."""
    stopped: str | None = None
    """Why the run ended early; None if it did not."""
    skipped: int | None = None
    """Number of skipped steps; None in runs saved before these were counted."""
    clipped: int | None = None
    """Number of steps whose gradient was clipped to `optimizer.clip_norm`; None as above."""

    @property
    def loss(self) -> float:
        """Validation loss after the last step in nats per token; inf if the run ended early."""
        return self.points[-1].loss if self.points and self.stopped is None else math.inf


@dataclass(frozen=True)
class Summary:
    """The results of a variant over its seeds."""

    variant: str
    parameters: int
    losses: tuple[float, ...]
    """Loss for each seed."""
    gains: tuple[float, ...]
    """Loss of the first variant minus this one's, for each seed."""
    step_ratio: float
    """Median over the seeds of the step time relative to the first variant's."""
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
    """Standard deviation over seeds (n − 1); 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def load_experiment(path: Path) -> Experiment:
    """Read an experiment's TOML file. Raises UserError if it is invalid."""
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
    """The seeds of an experiment. Raises UserError, naming the setting, if they are invalid."""
    listed = seeds if isinstance(seeds, list | tuple) else ()
    if not listed or not all(type(seed) is int and seed >= 0 for seed in listed):
        raise UserError(f"{name} must be a list of whole numbers of at least 0, such as [1, 2, 3]")
    if len(set(listed)) < len(listed):
        raise UserError(f"a seed occurs twice in {name}")
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
    """Train `config` from its seed, in memory. Raises Stopped if a signal asks to stop."""
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
    """Also records the time of every step, and counts skipped and clipped steps."""

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
    """Train every variant from every seed, seed by seed; runs saved in `folder` are reused.

    report: called with every run, and whether it was reused. Raises UserError if the folder cannot be used.
    """
    kept = _RunStore(folder / RUNS)
    done = []
    for name, config in _configurations(experiment, base):
        found = kept.find(name, config)
        known = found is not None
        if found is None:
            found = run(name, config)
            kept.add(found, config)
        done.append(found)
        report(found, known)
    return done


def _configurations(experiment: Experiment, base: Config) -> Iterator[tuple[str, Config]]:
    for seed in experiment.seeds:
        for name, config in experiment.variants(base):
            yield name, dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


class _RunStore:
    """Finished runs, saved in a file; a run is reused only for exactly the same configuration."""

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
        """The saved run of this configuration, with `name` as its variant; None if there is none."""
        for entry in self._entries:
            if entry["config"] == _identity(config):
                values = entry["run"]
                points = tuple(Point(**point) for point in values["points"])
                return SeedRun(**values | {"points": points, "variant": name})
        return None

    def add(self, run: SeedRun, config: Config) -> None:
        """Save a run."""
        self._entries.append({"config": _identity(config), "run": dataclasses.asdict(run)})
        write_atomically(self._path, exact_json.dumps({"runs": self._entries}, indent=1) + "\n")


def _identity(config: Config) -> dict[str, Any]:
    """The settings that a run's results depend on: not its folder, samples or logging."""
    values = as_dict(dataclasses.replace(config, output=None))
    values["training"] |= {"sample_tokens": 0, "sample_prompt": None}
    for name in ("sample_every", "diagnose_every", "tensorboard"):
        del values["training"][name]
    if values["model"]["attention"] == "standard":
        del values["model"]["lattice"], values["optimizer"]["lattice_rate"]
    for section, name in ((values, "initial"), (values["model"], "vocabulary")):
        if section[name] is None:  # compatible with runs saved before the setting was added
            del section[name]
    return exact_json.loads(exact_json.dumps(values))


# ---- results


def summarise(experiment: Experiment, runs: Sequence[SeedRun]) -> list[Summary]:
    """A summary of every variant, in order."""
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
