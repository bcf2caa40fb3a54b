"""A checkpoint's arrays into the parameters of a model that is there: only where names, shapes and dtypes agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.checkpoint import Checkpoint
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.utils.errors import UserError

Array = np.ndarray[Any, Any]


def stored_architecture(values: dict[str, Any], path: Path | str) -> Architecture:
    """The architecture in a checkpoint. UserError for one that only another version knows."""
    try:
        return Architecture.from_dict(values)
    except TypeError as error:
        raise UserError(f"{path} describes a model this version does not know: {error}") from None


def require_architecture(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """UserError where the checkpoint is of a model of another shape."""
    stored = dataclasses.asdict(stored_architecture(checkpoint.architecture, "the checkpoint"))
    for name, value in dataclasses.asdict(architecture).items():
        if stored[name] != value:
            raise UserError(f"the checkpoint is of another model: {name} is {stored[name]} in it, {value} here")


def match_parameters(
    arrays: Mapping[str, Array], target: FlatParameters, backend: Backend, *, rounded: bool = False
) -> None:
    """Copy a checkpoint's arrays into `target`'s views, on the device; names and shapes must be the same.

    A narrower dtype is widened; nothing is rounded unless `rounded`: then float32 may be, to its nearest. Raises
    UserError that names the first array that is missing, extra, of another shape or of a wider dtype; nothing is copied
    then.
    """
    wanted, kept = target.layout.specs, target.layout.dtype
    widest = wide_dtype(kept) if rounded else kept
    other = "the checkpoint is of another model"
    for name, spec in wanted.items():
        if name not in arrays:
            raise UserError(f"{other}: {name} {list(spec.shape)} is missing from it")
        found = arrays[name]
        if found.shape != spec.shape:
            raise UserError(f"{other}: {name} is {list(found.shape)} in it, this model needs {list(spec.shape)}")
        if not np.can_cast(found.dtype, widest, "safe"):
            raise UserError(f"{other}: {name} is {found.dtype} in it, this model holds {kept}")
    for name in arrays:
        if name not in wanted:
            raise UserError(f"{other}: it has {name} {list(arrays[name].shape)}, this model does not")
    for name, view in target.items():
        view[...] = backend.asarray(arrays[name]).astype(kept, copy=False)
