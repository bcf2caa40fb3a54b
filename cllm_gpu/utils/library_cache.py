"""The cache of compiled code: a folder that only its owner may write, and a SHA-256 beside each library.

What is loaded from here runs with the user's rights, and a truncated library ends the process that loads it (SIGBUS).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cllm_gpu.utils.errors import UserError

_DIGEST = ".sha256"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory() -> Path:
    """Folder of everything this package may rebuild: $CLLM_CACHE_DIR, else the user's cache folder.

    Raises UserError if $CLLM_CACHE_DIR is not an absolute path.
    """
    if chosen := os.environ.get("CLLM_CACHE_DIR"):
        if not os.path.isabs(chosen):
            raise UserError(f"CLLM_CACHE_DIR is {chosen!r}; it must be an absolute path")
        return Path(chosen)
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "cllm_gpu"
    cache = os.environ.get("XDG_CACHE_HOME") or ""  # the XDG specification: a relative one is to be ignored
    return Path(cache if os.path.isabs(cache) else Path(os.path.expanduser("~"), ".cache")) / "cllm_gpu"


def code_folder(name: str) -> Path:
    """The folder `name` of the cache, for compiled code, created with mode 0700 if missing.

    Raises UserError if it cannot be created, if another user owns it, or if others may write it.
    """
    root = cache_directory()
    folder = root / name
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in (root, folder):
            path.mkdir(mode=0o700, exist_ok=True)
        _close_to_others(root)
        for path in (root, folder):
            _require_own(path)
    except OSError as error:
        raise UserError(f"cannot write compiled code to {folder}: {error.strerror}; set CLLM_CACHE_DIR") from error
    return folder


def _close_to_others(root: Path) -> None:
    """Prepared data lies here too, and may have made the folder first; no code is loaded from it directly."""
    found = root.stat()
    is_shared = found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX  # in /tmp names have owners
    if os.name != "nt" and found.st_uid == os.geteuid() and is_shared:
        root.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)


def _require_own(folder: Path) -> None:
    if os.name == "nt":
        return
    found = folder.stat()
    is_leaf = folder != cache_directory()
    advice = "compiled code is loaded only from a folder of your own; set CLLM_CACHE_DIR to one"
    if found.st_uid not in (os.geteuid(), 0):
        raise UserError(f"{folder} belongs to another user (id {found.st_uid}): {advice}")
    if found.st_mode & _OTHERS_WRITE and (is_leaf or not found.st_mode & stat.S_ISVTX):
        mode = f"{stat.S_IMODE(found.st_mode):o}"
        raise UserError(f"others may write {folder} (mode {mode}): {advice}, or take their right away: chmod go-w")


def write_digest(target: Path, paths: Iterable[Path]) -> None:
    """Write the SHA-256 of the files `paths`, in order, beside `target`, before `target` itself is there."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}{_DIGEST}")
    temporary.write_text(_digest(paths), encoding="ascii")
    os.replace(temporary, target.with_name(target.name + _DIGEST))


def is_sound(target: Path, paths: Iterable[Path]) -> bool:
    """Whether the files `paths` have the SHA-256 that stands beside `target`."""
    with contextlib.suppress(OSError, ValueError):
        return target.with_name(target.name + _DIGEST).read_text(encoding="ascii") == _digest(paths)
    return False


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
