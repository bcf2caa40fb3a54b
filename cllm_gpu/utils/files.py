"""Files that are there completely or not at all, and file errors as one clear line.

A file is written under a temporary name in its own folder, synced, and renamed over the old one: a crash or a full
disk at any moment leaves the old file as it was. What such a moment leaves behind ends in `.partial`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cllm_gpu.utils.errors import UserError

PARTIAL = ".partial"
"""Ending of every temporary name."""

_NO_SPACE = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
_REASONS = {
    errno.ENOENT: "it does not exist",
    errno.EISDIR: "it is a folder, a file is needed there",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EEXIST: "a file is where a folder is needed",
    errno.EMFILE: "too many files are open",
    errno.ENAMETOOLONG: "the name is too long",
}


def readable_size(count: int) -> str:
    """Bytes for people: 512 B, 1.5 kB, 3.2 GB (powers of 1000)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def describe_error(error: OSError, doing: str, path: Path, needs: int | None = None) -> str:
    """One line for an OSError met while `doing` ("write", "read") something to `path`; `needs` bytes of space."""
    if error.errno in _NO_SPACE:
        needed = f"needs {readable_size(needs)}, " if needs is not None else ""
        return f"no space left on the disk of {path}: {needed}{_free_space(path)}; free some or choose another folder"
    if error.errno in _NO_PERMISSION:
        return f"cannot {doing} {path}: no permission; choose another place or change its permissions"
    reason = _REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    return f"cannot {doing} {path}: {reason}"


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            return f"{readable_size(shutil.disk_usage(folder).free)} are free"
    return "none is free"


@contextlib.contextmanager
def clear_errors(doing: str, path: Path, needs: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body into a UserError that names `path`; see `describe_error`."""
    try:
        yield
    except OSError as error:
        raise UserError(describe_error(error, doing, path, needs)) from error


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file (text as UTF-8, line ends as given) so that it is there completely or as it was before.

    Its folder is made if needed. One writer at a time. Raises UserError when the disk is full or the place cannot be
    written.
    """
    content = data.encode() if isinstance(data, str) else data
    if path.is_dir():  # ".", which has no name, among them
        raise UserError(describe_error(IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)), "write", path))
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with clear_errors("write", path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb", buffering=0) as file:
                write_fully(file.fileno(), content)
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            remove(partial)
            raise
        sync_folder(path.parent)


def write_fully(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of `content` (bytes) to an open file; the system may take less than what it is offered."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power failure, where the platform can sync a folder."""
    if os.name == "nt":  # Windows opens no folders; its file systems journal names themselves
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, and sync every new name. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder with all in it, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_partials(folder: Path) -> None:
    """Remove what an interrupted writer left in `folder`."""
    for path in folder.glob(f".*{PARTIAL}"):
        remove(path)
