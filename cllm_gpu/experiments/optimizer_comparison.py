"""Compares optimizers and schedules on the same model and seed: which reaches a given loss sooner, with tuned rates.

A family is one optimizer and schedule; its settings differ only in the learning rate. Every family is trained with
equally many rates, a constant factor apart. If the best rate is at an end of the grid, the grid is extended beyond that
end (by the same maximum for every family). The loss is the validation loss; a loss is reached at the first evaluation
that is not above it. Times are of training steps, without evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from cllm_gpu.config import Config, ScheduleConfig, as_dict
from cllm_gpu.experiments.run_in_memory import Curve, Point
from cllm_gpu.utils.errors import UserError

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["constant", "linear", "cosine", "step", "wsd"]

BASELINE = "sgd"
RATES: dict[OptimizerName, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3, 1.0),
    "adam": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "adamw": (0.0003, 0.001, 0.003, 0.01, 0.03),
}
"""Grid of learning rates: two decades around each optimizer's usual rate, half a decade apart."""
ADAMW_DECAY = 0.1
"""AdamW's weight decay if the configuration has none: without weight decay it would be Adam."""
EVALUATIONS = 40
"""Minimum number of evaluations per run, so that the steps to a loss are known to 1/40 of the run."""
EXTENSIONS = 3
"""Maximum number of rates by which a family's grid is extended."""


@dataclass(frozen=True)
class Setting:
    """One run to train: its name, its family, and its configuration."""

    name: str
    family: str
    config: Config

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.config.optimizer.rate


@dataclass(frozen=True)
class Run:
    """A setting and its training curve."""

    setting: Setting
    curve: Curve

    @property
    def best_loss(self) -> float:
        """The lowest loss; inf if no loss was finite."""
        return self.curve.best.loss if self.curve.best else math.inf


@dataclass(frozen=True)
class Row:
    """A family in the comparison. "sooner": the speedup, the baseline's steps or seconds to the target over its own."""

    family: str
    runs: int
    """Number of rates tried."""
    tuned: str
    """Name of the setting with the lowest loss."""
    rate: float
    """Learning rate of the tuned setting."""
    at_edge: bool
    """Whether that rate is the lowest or highest tried, so that a better one may exist beyond it."""
    best_loss: float
    steps: int | None
    """Steps of the tuned setting to the target; None if it did not reach it."""
    seconds: float | None
    steps_sooner: float | None
    seconds_sooner: float | None
    fastest: str | None
    """Name of the setting of this family that reached the target in the fewest steps."""
    fastest_steps: int | None
    fastest_sooner: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs, and a row per family that compares it with the baseline's best loss."""

    baseline: str
    target: float
    """The lowest loss of the baseline's best-tuned setting."""
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, including configurations and curves."""
        return {
            "baseline": self.baseline,
            "target": self.target,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "runs": [
                {
                    "name": run.setting.name,
                    "family": run.setting.family,
                    "config": as_dict(run.setting.config),
                    "stopped": run.curve.stopped,
                    "points": [dataclasses.asdict(point) for point in run.curve.points],
                }
                for run in self.runs
            ],
        }

    def tuned(self) -> list[Run]:
        """The best-tuned run of every family, in the order of the rows."""
        by_name = {run.setting.name: run for run in self.runs}
        return [by_name[row.tuned] for row in self.rows]


# ---- the settings


def default_settings(
    config: Config,
    *,
    optimizers: Sequence[OptimizerName] = ("sgd", "adam", "adamw"),
    schedules: Sequence[ScheduleName] = (),
) -> list[Setting]:
    """A grid of rates for every optimizer with `config`'s schedule, and for AdamW with each of `schedules`.

    The minimum rate keeps its ratio to the peak rate; runs are evaluated at least 40 times.
    """
    _require_known(optimizers, get_args(OptimizerName), "optimizer")
    _require_known(schedules, get_args(ScheduleName), "schedule")
    settings = [s for name in optimizers for s in _grid(config, name, name)]
    for schedule in schedules:
        if schedule != config.schedule.name:
            other = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, name=schedule))
            settings += _grid(other, "adamw", f"adamw {schedule}")
    return settings


def _require_known(names: Iterable[str], known: tuple[str, ...], what: str) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{what} {name!r} is not known; choose from {', '.join(known)}")


def _grid(config: Config, optimizer: OptimizerName, family: str) -> list[Setting]:
    decay = config.optimizer.weight_decay or (ADAMW_DECAY if optimizer == "adamw" else 0.0)
    loop = config.training
    often = max(1, loop.steps // EVALUATIONS)
    base = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name=optimizer, weight_decay=decay),
        training=dataclasses.replace(loop, evaluate_every=min(loop.evaluate_every or often, often)),
    )
    return [with_rate(Setting("", family, base), rate) for rate in RATES[optimizer]]


def with_rate(setting: Setting, rate: float) -> Setting:
    """The setting with another peak rate, which its name contains."""
    config = setting.config
    rate = float(f"{rate:.3g}")
    minimum = config.schedule.minimum_rate / config.optimizer.rate * rate
    schedule: ScheduleConfig = dataclasses.replace(config.schedule, minimum_rate=min(minimum, rate))
    optimizer = dataclasses.replace(config.optimizer, rate=rate)
    new = dataclasses.replace(config, optimizer=optimizer, schedule=schedule)
    return Setting(f"{setting.family} rate {rate:g}", setting.family, new)


# ---- the comparison


def compare(
    settings: Sequence[Setting],
    run: Callable[[Config], Curve],
    *,
    baseline: str = BASELINE,
    extensions: int = EXTENSIONS,
    report: Callable[[Run], None] = lambda run: None,
) -> Comparison:
    """Run every setting, and up to `extensions` more rates per family while its best rate is at the end of the grid.

    report: called with every finished run. Raises UserError if the settings do not train the same model on the same
    batches for the same number of steps, or if the baseline is missing or reached no finite loss.
    """
    _require_comparable(settings, baseline)
    runs: list[Run] = []

    def make(setting: Setting) -> Run:
        done = Run(setting, run(setting.config))
        runs.append(done)
        report(done)
        return done

    families: dict[str, list[Run]] = {}
    for setting in settings:
        families.setdefault(setting.family, []).append(make(setting))
    for grid in families.values():
        for _ in range(extensions):
            rate = next_rate([(r.setting.rate, r.best_loss) for r in grid])
            if rate is None:
                break
            grid.append(make(with_rate(grid[0].setting, rate)))
    return summarise(families, runs, baseline)


def _require_comparable(settings: Sequence[Setting], baseline: str) -> None:
    families = {setting.family for setting in settings}
    if baseline not in families:
        raise UserError(f"the comparison is against {baseline}, which is not among {', '.join(sorted(families))}")
    if len({setting.name for setting in settings}) != len(settings):
        raise UserError("two settings of the comparison have the same name")
    first = settings[0].config
    for setting in settings:
        c = setting.config
        same = (c.model, c.data, c.training) == (first.model, first.data, first.training)
        if not same:
            raise UserError(f"{setting.name} and {settings[0].name} differ in more than optimizer and schedule")


def next_rate(tried: Sequence[tuple[float, float]]) -> float | None:
    """The next rate to try after these (rate, lowest loss) pairs; None if the best rate is not at an end of the grid.

    The grid is extended by the factor between the two rates at that end. Also None with fewer than two rates, or if all
    of them diverged.
    """
    order = sorted(tried)
    losses = [loss for _, loss in order]
    best = losses.index(min(losses))
    if len(order) < 2 or not math.isfinite(losses[best]) or 0 < best < len(order) - 1:
        return None
    end, neighbour = (order[0][0], order[1][0]) if best == 0 else (order[-1][0], order[-2][0])
    return end * end / neighbour


def summarise(families: dict[str, list[Run]], runs: Sequence[Run], baseline: str) -> Comparison:
    """Compare families of runs. Raises UserError if the baseline has no finite loss."""
    tuned = {name: min(grid, key=lambda r: r.best_loss) for name, grid in families.items()}
    target = tuned[baseline].best_loss
    if not math.isfinite(target):
        raise UserError(f"no run of {baseline} reached a finite loss; there is nothing to compare with")
    reference = tuned[baseline].curve.reach(target)
    assert reference is not None
    rows = tuple(_row(name, grid, tuned[name], target, reference) for name, grid in families.items())
    return Comparison(baseline, target, rows, tuple(runs))


def _row(family: str, grid: list[Run], tuned: Run, target: float, reference: Point) -> Row:
    there = tuned.curve.reach(target)
    reached = [(point.step, run.setting.name) for run in grid if (point := run.curve.reach(target))]
    fastest = min(reached, default=None)
    return Row(
        family=family,
        runs=len(grid),
        tuned=tuned.setting.name,
        rate=tuned.setting.rate,
        at_edge=next_rate([(r.setting.rate, r.best_loss) for r in grid]) is not None,
        best_loss=tuned.best_loss,
        steps=there.step if there else None,
        seconds=there.seconds if there else None,
        steps_sooner=reference.step / there.step if there else None,
        seconds_sooner=reference.seconds / there.seconds if there and there.seconds > 0 else None,
        fastest=fastest[1] if fastest else None,
        fastest_steps=fastest[0] if fastest else None,
        fastest_sooner=reference.step / fastest[0] if fastest else None,
    )
