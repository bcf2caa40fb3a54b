"""Checkpoints: everything a run needs to go on bit for bit, or to be used, in folders that are complete or not there.

    run/checkpoints/step_00001000/
        model.safetensors      the parameters by name, in float32 where there are masters; other tools can read them
        optimizer.safetensors  "first_moment/blocks.0.qkv.weight" …
        manifest.json          configuration, architecture, tokenizer, step, loop state, SHA-256 of every file

A checkpoint is written into a folder with a temporary name, every file and the folder are synced, and then the folder
is renamed. Only after that are old checkpoints removed. Which checkpoint is the best stands in the manifests (the
newest that was the best when it was written), so no second file can disagree with them after a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cllm_gpu.checkpoint.manifest import MANIFEST, Manifest, manifest_text, read_manifest
from cllm_gpu.checkpoint.safetensors_io import (
    DamagedError,
    read_tensors,
    tensors_size,
    verify_file,
    write_synced,
    write_tensors,
)
from cllm_gpu.checkpoint.soundness import require_finite, require_moments
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import PARTIAL, clear_errors, remove, remove_partials, sync_folder, write_atomically

CHECKPOINTS = "checkpoints"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
REPLACED = ".replaced"
IDENTITY = "run.id"
"""Of a run's folder: its identity and the beginning of that one's SHA-256."""
_NOT_SAVED = "it was not saved, and earlier checkpoints are as they were"
_USE_ANOTHER = "use another checkpoint"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` optimizer steps, on the host."""

    config: dict[str, Any]
    """Plain data, as `cllm_gpu.config.as_dict` gives it; so are the three below."""
    architecture: dict[str, Any]
    tokenizer: dict[str, Any]
    step: int
    state: dict[str, Any]
    """The loop's own: counters, windows, the best loss. Floats come back to the bit, infinities and NaN too."""
    parameters: dict[str, Array]
    """By name."""
    optimizer: dict[str, dict[str, Array]]
    """Moments ("first_moment", …) → parameter name → array."""
    passed_over: tuple[str, ...] = ()
    """When a run's folder was read: a line for each newer checkpoint that is incomplete or damaged."""


# ---- writing


def save_checkpoint(run: Path, checkpoint: Checkpoint, *, keep_last: int, best: bool) -> Path:
    """Write a checkpoint of `run` and return its folder; then keep the newest `keep_last` and the best one.

    Checkpoints written while steps were being skipped do not count for `keep_last`: they take no sound one's place.
    Checkpoints of later steps are of a course that was given up (the run was resumed from an earlier one) and go too.
    One of the same step is replaced. Arrays are written from where they lie: no copy of contiguous ones is made.
    Raises UserError when the disk is full, the folder cannot be written, or weights or moments are not finite; all
    earlier checkpoints are then intact.
    """
    where = f"checkpoint of step {checkpoint.step}"
    require_finite(checkpoint.parameters, where, _NOT_SAVED)
    require_moments(checkpoint.optimizer, where, _NOT_SAVED)
    folder = run / CHECKPOINTS
    target = folder / f"step_{checkpoint.step:08d}"
    partial = folder / f".{target.name}{PARTIAL}"
    moments = _joined(checkpoint.optimizer)
    needs = tensors_size(checkpoint.parameters) + tensors_size(moments)
    with clear_errors("write", target, needs):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(run)
        _clean(folder)
        try:
            partial.mkdir()
            _write_files(partial, checkpoint, moments, best)
            _put_in_place(partial, target)
        except BaseException:
            remove(partial)
            raise
        sync_folder(folder)
    _prune(folder, checkpoint.step, keep_last)
    return target


def _joined(optimizer: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    return {f"{moment}/{name}": array for moment, arrays in optimizer.items() for name, array in arrays.items()}


def _write_files(folder: Path, checkpoint: Checkpoint, moments: dict[str, Array], best: bool) -> None:
    """The three files, synced, and the folder that lists them. Raises OSError."""
    manifest = Manifest(
        step=checkpoint.step,
        best=best,
        optimizer=list(checkpoint.optimizer),
        files={
            MODEL: write_tensors(folder / MODEL, checkpoint.parameters),
            OPTIMIZER: write_tensors(folder / OPTIMIZER, moments),
        },
        content={
            "config": checkpoint.config,
            "architecture": checkpoint.architecture,
            "tokenizer": checkpoint.tokenizer,
            "state": checkpoint.state,
        },
    )
    write_synced(folder / MANIFEST, iter([manifest_text(manifest)]))
    sync_folder(folder)


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename the finished folder; one of the same step steps aside first and is still found by readers meanwhile."""
    aside = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(partial, target)
    except OSError:
        if aside.exists():
            os.rename(aside, target)
        raise
    remove(aside)


def _clean(folder: Path) -> None:
    """Undo or finish what an interrupted writer began."""
    remove_partials(folder)
    for aside in folder.glob(f".step_*{REPLACED}"):
        target = aside.with_name(aside.name[1 : -len(REPLACED)])
        if target.exists():
            remove(aside)
        else:
            os.rename(aside, target)


def _prune(folder: Path, newest: int, keep_last: int) -> None:
    """Remove all but step `newest`, the `keep_last` newest sound ones up to it, and the best of them."""
    steps = _complete(folder)
    earlier = [step for step in steps if step <= newest]
    sound = [step for step in earlier if not _skipping(steps[step])]
    kept = {newest, *sound[:keep_last]} if keep_last > 0 else {newest}
    kept |= set(_best_of({step: steps[step] for step in earlier}))
    for path in _folders(folder).values():
        if path not in {steps.get(step) for step in kept} and not _is_foreign(path):
            _remove_aside(path)


def _remove_aside(path: Path) -> None:
    """Remove a checkpoint under a temporary name, so that none is seen half removed, whenever the process dies."""
    aside = path.with_name(f".{path.name.removeprefix('.')}.removed{PARTIAL}")
    with contextlib.suppress(OSError):  # what cannot be renamed cannot be removed either: the next save tries again
        os.rename(path, aside)
        remove(aside)


# ---- the identity of a run


class ForeignCheckpointError(DamagedError):
    """A checkpoint in the folder of a run that is not its own."""


def run_identity(run: Path) -> str | None:
    """The identity of the run in a folder; None if it has none, or a damaged one."""
    try:
        identity, _, digest = (run / IDENTITY).read_text("utf-8").strip().partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    return identity if digest == _identity_digest(identity) else None


def identify_run(run: Path, known: str | None) -> str:
    """The identity of the run in a folder, written into it if it has none: `known`, its checkpoint's, or a new one.

    UserError if that cannot be written.
    """
    identity = run_identity(run)
    if identity is None:
        identity = known or uuid.uuid4().hex
        write_atomically(run / IDENTITY, f"{identity} {_identity_digest(identity)}\n")
    return identity


def _identity_digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _require_own(folder: Path, manifest: Manifest) -> None:
    """ForeignCheckpointError if the checkpoint lies in the folder of another run. Those of 0.1 have no identity."""
    if folder.parent.name != CHECKPOINTS:
        return
    run = folder.parent.parent
    own, found = run_identity(run), manifest.content["state"].get("run")
    if own is not None and found is not None and own != found:
        raise ForeignCheckpointError(
            f"{folder} is a checkpoint of another run, not of {run}: begin a new run from it with --initial"
        )


def _is_foreign(folder: Path) -> bool:
    try:
        _require_own(folder, read_manifest(folder))
    except ForeignCheckpointError:
        return True
    except UserError:
        return False
    return False


# ---- finding


def newest_checkpoint(run: Path) -> Path | None:
    """Folder of the newest complete checkpoint of a run, or None. Sizes are checked, contents only when it is read."""
    return next(iter(_complete(run / CHECKPOINTS).values()), None)


def holds_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint, sound or not."""
    return bool(_folders(run / CHECKPOINTS))


def named_checkpoint(run: Path, name: str) -> Path:
    """Folder of the checkpoint of `run` that is called `name`, such as step_00000500. UserError if it has no such."""
    folders = {
        path.name.removeprefix(".").removesuffix(REPLACED): path for path in _folders(run / CHECKPOINTS).values()
    }
    if name not in folders:
        known = ", ".join(folders) or "none"
        raise UserError(f"{run} has no checkpoint {name}; its checkpoints, newest first: {known}")
    return folders[name]


def best_checkpoint(run: Path) -> Path | None:
    """Folder of the complete checkpoint with the lowest validation loss of a run, or None when none was marked."""
    return next(iter(_best_of(_complete(run / CHECKPOINTS)).values()), None)


def _folders(folder: Path) -> dict[int, Path]:
    """Step → folder of every checkpoint, complete or not, newest first."""
    found: dict[int, Path] = {}
    with clear_errors("read", folder):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in paths:  # ".step_…" sorts first: the real name wins
        match = re.fullmatch(r"step_(\d+)|\.step_(\d+)\.replaced", path.name)
        if match and path.is_dir():
            found[int(match[1] or match[2])] = path
    return dict(sorted(found.items(), reverse=True))


def _complete(folder: Path) -> dict[int, Path]:
    return {step: path for step, path in _folders(folder).items() if _manifest_if_complete(path) is not None}


def _manifest_if_complete(path: Path) -> Manifest | None:
    """The manifest, when it is sound, of this run, and every file it names has its size."""
    try:
        manifest = read_manifest(path)
        _require_own(path, manifest)
        sizes = {name: (path / name).stat().st_size for name in manifest.files}
    except (UserError, OSError):
        return None
    return manifest if all(sizes[name] == file.size for name, file in manifest.files.items()) else None


def _skipping(path: Path) -> bool:
    """Whether the steps before the checkpoint were skipped, so that its weights are an earlier step's."""
    manifest = _manifest_if_complete(path)
    guard = manifest.content["state"].get("guard", {}) if manifest is not None else {}
    return bool(guard.get("skipped_in_a_row", 0))


def _best_of(steps: dict[int, Path]) -> dict[int, Path]:
    """The newest of complete checkpoints (newest first) that was the best when it was written."""
    for step, path in steps.items():
        manifest = _manifest_if_complete(path)
        if manifest is not None and manifest.best:
            return {step: path}
    return {}


# ---- reading


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint: its own folder, or a run's (then the newest one that is sound in every byte).

    Raises UserError when there is none, or it is truncated, changed, incomplete, or of a newer format, or holds weights
    or moments that are not finite.
    """
    if _chosen(path, "last") == path:
        return _read(path)
    first: UserError | None = None
    passed_over: list[str] = []
    for folder in _folders((path.parent if path.name == CHECKPOINTS else path) / CHECKPOINTS).values():
        try:
            return dataclasses.replace(_read(folder), passed_over=tuple(passed_over))
        except UserError as error:
            if not _is_damage(error):
                raise  # what only could not be read now is not to be overwritten by an earlier course
            first = first or error
            passed_over.append(f"{error} (passed over)")
    assert first is not None
    raise first


def _is_damage(error: UserError) -> bool:
    """Whether an error is of a checkpoint's content, or of the disk that holds it."""
    cause = error.__cause__
    return isinstance(error, DamagedError) or (isinstance(cause, OSError) and cause.errno == errno.EIO)


def _read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every file of it verified. It must be of the run in whose folder it lies."""
    manifest = read_manifest(folder)
    _require_own(folder, manifest)
    for name, record in manifest.files.items():
        verify_file(folder / name, record)
    optimizer: dict[str, dict[str, Array]] = {moment: {} for moment in manifest.optimizer}
    for joined, array in read_tensors(folder / OPTIMIZER).items():
        moment, name = joined.split("/", 1)
        optimizer[moment][name] = array
    require_moments(optimizer, folder / OPTIMIZER, _USE_ANOTHER)
    return _checkpoint(manifest, _read_weights(folder), optimizer)


def load_model(path: Path, which: Literal["best", "last"] = "best") -> Checkpoint:
    """Like `load_checkpoint` without the optimizer, whose file may be absent when `path` is a checkpoint's folder.

    Of a run's folder it takes the best checkpoint, or the newest when none was marked or `which` is "last".
    """
    folder, manifest = model_manifest(path, which)
    verify_file(folder / MODEL, manifest.files[MODEL])
    return _checkpoint(manifest, _read_weights(folder), {})


def _read_weights(folder: Path) -> dict[str, Array]:
    weights = read_tensors(folder / MODEL)
    require_finite(weights, folder / MODEL, _USE_ANOTHER)
    return weights


def model_manifest(path: Path, which: Literal["best", "last"] = "best") -> tuple[Path, Manifest]:
    """The folder of the checkpoint that `load_model` would read, and its manifest alone. UserError as there."""
    folder = _chosen(path, which)
    return folder, read_manifest(folder)


def _checkpoint(
    manifest: Manifest,
    parameters: dict[str, Array],
    optimizer: dict[str, dict[str, Array]],
) -> Checkpoint:
    return Checkpoint(step=manifest.step, parameters=parameters, optimizer=optimizer, **manifest.content)


def _chosen(path: Path, which: Literal["best", "last"]) -> Path:
    """The checkpoint's folder that `path` means. Raises UserError when it means none."""
    with clear_errors("read", path):
        if not path.exists():
            raise UserError(f"checkpoint {path} does not exist; give the folder of a run or of a checkpoint")
        if not path.is_dir():
            raise UserError(f"checkpoint {path} is a file; give the folder of a run or of a checkpoint")
        if (path / "config.json").exists() and not (path / MANIFEST).exists():
            raise UserError(f"{path} is a model as Hugging Face stores it: read it with `cllm-gpu import {path}` first")
        if (path / MANIFEST).exists() or (path / MODEL).exists() or re.fullmatch(r"step_\d+", path.name):
            return path
    run = path.parent if path.name == CHECKPOINTS else path
    found = (best_checkpoint(run) if which == "best" else None) or newest_checkpoint(run)
    if found is not None:
        return found
    damaged = next(iter(_folders(run / CHECKPOINTS).values()), None)
    if damaged is not None:
        return damaged  # reading it tells what is wrong with it
    raise UserError(f"{path} holds no checkpoint: expected {MANIFEST} in it, or {CHECKPOINTS}/step_… of a run")
