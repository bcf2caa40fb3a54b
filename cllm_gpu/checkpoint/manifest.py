"""A checkpoint's manifest: what the checkpoint is of, and the SHA-256 of every file, itself included.

JSON with `"sha256"` as its first entry: the SHA-256 of the whole text with zeros in that place. So a change of any
byte is found, of white space and of the digest itself too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_gpu import __version__
from cllm_gpu.checkpoint.safetensors_io import DamagedError, FileRecord
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

MANIFEST = "manifest.json"
FORMAT = "cllm-gpu checkpoint"
VERSION = 1
"""Of the format; a reader refuses what is newer than itself."""

_START = b'{\n "sha256": "'
_ZEROS = b"0" * 64


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest; `content` holds what describes the run (plain data)."""

    step: int
    best: bool
    """The validation loss was the lowest so far."""
    optimizer: list[str]
    """Names of the optimizer's moments; one may have no arrays."""
    files: dict[str, FileRecord]
    content: dict[str, Any]
    """config, architecture, tokenizer, state."""


def manifest_text(manifest: Manifest) -> bytes:
    """The file's bytes. Raises TypeError when `content` is not plain data."""
    entries = {
        "sha256": _ZEROS.decode(),
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"cllm-gpu {__version__}",
        "step": manifest.step,
        "best": manifest.best,
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in manifest.files.items()},
        "optimizer": manifest.optimizer,
        **manifest.content,
    }
    text = exact_json.dumps(entries, indent=1).encode() + b"\n"
    return _with_digest(text, hashlib.sha256(text).hexdigest().encode())


def _with_digest(text: bytes, digest: bytes) -> bytes:
    return _START + digest + text[len(_START) + len(digest) :]


class NewerFormatError(UserError):
    """A checkpoint that a newer version of this package wrote."""


def read_manifest(folder: Path) -> Manifest:
    """The verified manifest of a checkpoint's folder.

    Raises DamagedError when it is missing or damaged, NewerFormatError when it is of a newer version of the format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{path} is missing: the checkpoint is incomplete; use another one")
    with clear_errors("read", path):
        text = path.read_bytes()
    _refuse_newer(path, text)
    digest = text[len(_START) : len(_START) + len(_ZEROS)]
    if hashlib.sha256(_with_digest(text, _ZEROS)).hexdigest().encode() != digest or not text.startswith(_START):
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one written in it; use another checkpoint")
    entries = exact_json.loads(text)
    return Manifest(
        step=entries["step"],
        best=entries["best"],
        optimizer=entries["optimizer"],
        files={name: FileRecord(file["size"], file["sha256"]) for name, file in entries["files"].items()},
        content={name: entries[name] for name in ("config", "architecture", "tokenizer", "state")},
    )


def _refuse_newer(path: Path, text: bytes) -> None:
    """Before the digest is looked at: a newer version may write it in another way."""
    try:
        entries = exact_json.loads(text)
        newer = entries["format"] == FORMAT and entries["version"] > VERSION
    except (ValueError, TypeError, KeyError):
        return
    if newer:
        raise NewerFormatError(
            f"{path} is of format version {entries['version']}; this cllm-gpu reads up to {VERSION}: "
            f"install the version that wrote it ({entries.get('written_by', 'unknown')}) or a newer one"
        )
