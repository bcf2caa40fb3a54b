"""The folder of a run: where the next one goes, which was the last, and who may write in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from cllm_gpu.checkpoint.checkpoint import Checkpoint, holds_checkpoint, newest_checkpoint
from cllm_gpu.config import Config, from_dict, load_toml, settings, to_toml, with_absolute_paths
from cllm_gpu.training.memory_plan import MemoryPlan
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, make_folder, sync_folder, write_atomically

RUNS = Path("runs")
CONFIGURATION = "config.toml"
METRICS = "metrics.jsonl"
PLAN = "plan.json"
LOCK = ".lock"


def begin_run(folder: Path | None) -> Path:
    """Make the folder of a new run: the given one, or the next free number in runs/.

    UserError when it cannot be made, or holds a run already.
    """
    if folder is None:
        return _next_number()
    if str(folder) == ".":
        raise UserError("--output is the folder to work in itself; give a run a folder of its own")
    with clear_errors("make", folder):
        make_folder(folder)
    if (folder / LOCK).exists():
        with lock_run(folder):  # a folder in which another process trains is neither to resume nor to remove
            pass
    if holds_checkpoint(folder):
        raise UserError(f"{folder} already holds a run: add --resume to continue it, or choose another --output")
    if (folder / METRICS).exists():
        raise UserError(f"{folder} holds a run that saved no checkpoint: choose another --output, or move it away")
    return folder


def _next_number() -> Path:
    """Claim the next of runs/001, runs/002, …: creating the folder claims it."""
    with clear_errors("make", RUNS):
        make_folder(RUNS)
        while True:
            folder = RUNS / f"{max(_numbers(), default=0) + 1:03d}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            sync_folder(RUNS)
            return folder


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Only one process at a time trains in a run's folder. UserError for the others."""
    with clear_errors("write", folder):
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another process is training in {folder}; wait for it, or choose another run") from None
    try:
        yield
    finally:
        lock.release()


def newest_run() -> Path:
    """The numbered run with a checkpoint that was begun last. UserError when there is none."""
    for number in sorted(_numbers(), reverse=True):
        folder = RUNS / f"{number:03d}"
        if holds_checkpoint(folder):
            return folder
    raise UserError(f"no run in {RUNS.resolve()}: train one first with `cllm-gpu train`, or name its folder")


def _numbers() -> list[int]:
    return [int(path.name) for path in RUNS.glob("[0-9]*") if path.name.isdecimal()] if RUNS.is_dir() else []


def save_configuration(folder: Path, config: Config) -> None:
    """Write the configuration in full, with absolute paths, into the run's folder, for people to read."""
    write_atomically(folder / CONFIGURATION, to_toml(with_absolute_paths(config)))


def save_plan(folder: Path, plan: MemoryPlan) -> None:
    """Write the memory plan, in bytes, into the run's folder."""
    write_atomically(folder / PLAN, exact_json.dumps(dict(plan.rows()), indent=1) + "\n")


def load_plan(folder: Path) -> dict[str, int]:
    """Bytes by what they are for, as `MemoryPlan.rows` has them; empty where the run kept no plan.

    UserError when the file is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        return {}
    with clear_errors("read", path):
        content = path.read_bytes()
    try:
        plan = exact_json.loads(content)
        if all(isinstance(name, str) and isinstance(size, int) for name, size in plan.items()):
            return plan
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path} is not a memory plan; move it away, or resume the run to write it again")


def load_configuration(folder: Path) -> Config:
    """The configuration of the run in `folder`, wherever it lay before. UserError when the folder holds no run."""
    path = folder / CONFIGURATION
    if not path.is_file():
        model = newest_checkpoint(folder) is not None
        hint = f"; train its model further in a new run: --initial {folder}" if model else ""
        raise UserError(f"{folder} holds no run to resume ({CONFIGURATION} is missing){hint}")
    return dataclasses.replace(load_toml(path), output=folder)


def require_run(folder: Path) -> None:
    """UserError if `folder` holds no run that can be resumed, only a model or nothing."""
    if not holds_checkpoint(folder) and not (folder / CONFIGURATION).is_file():
        raise UserError(f"{folder} holds no run to resume")


def configuration_of(checkpoint: Checkpoint, folder: Path) -> Config:
    """The configuration of the run in `folder` as its checkpoint holds it. UserError if that is an imported model."""
    if "data" not in checkpoint.state:
        raise UserError(f"{folder} holds no run to resume; train its model further in a new run: --initial {folder}")
    return dataclasses.replace(from_dict(checkpoint.config), output=folder)


def edited_settings(folder: Path, config: Config) -> str | None:
    """One line if the run's config.toml is missing, damaged, or says other than `config`, which a resume goes by."""
    path = folder / CONFIGURATION
    taken = "the checkpoint's configuration is taken, change it with flags"
    if not path.is_file():
        return f"{path} is missing: {taken}"
    try:
        found, wanted = settings(load_configuration(folder)), settings(config)
    except UserError as error:
        return f"{error}: {taken}"
    other = [f"{name} ({found[name]} there, {wanted[name]} here)" for name in wanted if found[name] != wanted[name]]
    return f"{path} differs in {', '.join(other)}: {taken}" if other else None
