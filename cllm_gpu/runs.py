"""The folder of a run: where the next one goes, which was the last, and what lies in it."""

from __future__ import annotations

from pathlib import Path

from cllm_gpu.checkpoints import newest_checkpoint
from cllm_gpu.config import Config, load_toml, to_toml
from cllm_gpu.errors import UserError
from cllm_gpu.files import write_atomically

RUNS = Path("runs")
CONFIGURATION = "config.toml"
METRICS = "metrics.jsonl"


def next_run_folder(runs: Path = RUNS) -> Path:
    """The first of runs/001, runs/002, … that does not exist after the last that does."""
    return runs / f"{max(_numbers(runs), default=0) + 1:03d}"


def newest_run(runs: Path = RUNS) -> Path:
    """The numbered run made last. UserError when there is none."""
    numbers = _numbers(runs)
    if not numbers:
        raise UserError(f"no run in {runs.resolve()}: train one first with `cllm-gpu train`, or name its folder")
    return runs / f"{max(numbers):03d}"


def _numbers(runs: Path) -> list[int]:
    return [int(path.name) for path in runs.glob("[0-9]*") if path.name.isdecimal()] if runs.is_dir() else []


def begin_run(folder: Path, config: Config) -> None:
    """Make the folder of a new run and save its configuration. UserError when a run is there already."""
    if newest_checkpoint(folder) is not None:
        raise UserError(f"{folder} already holds a run: add --resume to continue it, or choose another --output")
    save_configuration(folder, config)
    (folder / METRICS).unlink(missing_ok=True)


def save_configuration(folder: Path, config: Config) -> None:
    """Write the configuration in full into the run's folder."""
    write_atomically(folder / CONFIGURATION, to_toml(config))


def saved_configuration(folder: Path) -> Config:
    """The configuration a run was started with. UserError when the folder holds no run."""
    path = folder / CONFIGURATION
    if not path.is_file():
        raise UserError(f"{folder} holds no run to resume ({CONFIGURATION} is missing)")
    return load_toml(path)
