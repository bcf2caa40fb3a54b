"""Atomic writes: complete or as before, whatever fails, and one clear line that says what failed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.utils import files
from cllm_gpu.utils.errors import UserError

OLD, NEW = "old\n", "new\r\nand longer, é\n"


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_write_atomically_makes_folders_and_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    files.write_atomically(path, NEW)
    assert path.read_bytes() == NEW.encode()
    files.write_atomically(path, b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"
    assert [found.name for found in path.parent.iterdir()] == ["file.txt"]


def test_write_atomically_writes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    files.write_atomically(tmp_path / "file", NEW)
    assert (tmp_path / "file").read_bytes() == NEW.encode()


def test_write_atomically_syncs_before_it_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("write", "fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    files.write_atomically(tmp_path / "file", NEW)
    assert calls[:3] == ["write", "fsync", "replace"]
    assert calls[3:] == (["fsync"] if os.name != "nt" else [])  # the folder


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file.txt"
    files.write_atomically(path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(errno.ENOSPC))
        with pytest.raises(UserError, match=rf"no space left .*file\.txt: needs {len(NEW.encode())} B, .* are free"):
            files.write_atomically(path, NEW)
    assert path.read_text() == OLD
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_full_disk_while_the_write_is_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    files.write_atomically(path, OLD)
    write, calls = os.write, []

    def half(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, bytes(data[: len(data) // 2]))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(UserError, match="no space left"):
        files.write_atomically(path, NEW)
    assert len(calls) == 2
    assert path.read_text() == OLD
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_device_that_is_full_is_told_in_one_line() -> None:
    with (
        pytest.raises(UserError, match="no space left on the disk of /dev/full: needs 3 B"),
        files.clear_errors("write", Path("/dev/full"), 3),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        files.write_fully(file.fileno(), b"abc")


def test_an_unwritable_folder_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", failing(errno.EACCES))  # file modes do not stop an administrator
    with pytest.raises(UserError, match=r"^cannot write .*file: no permission"):
        files.write_atomically(tmp_path / "file", NEW)


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(OLD)
    with pytest.raises(UserError, match="a file is where a folder is needed"):
        files.write_atomically(tmp_path / "file" / "inner", NEW)
    assert (tmp_path / "file").read_text() == OLD


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*folder"):
        files.write_atomically(tmp_path / "folder", NEW)
    assert [found.name for found in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(errno.ENOENT, "x"), "cannot read p: it does not exist"),
        (IsADirectoryError(errno.EISDIR, "x"), "cannot read p: it is a folder, a file is needed there"),
        (OSError(errno.EIO, "Input/output error"), "cannot read p: Input/output error"),
        (OSError("strange"), "cannot read p: strange"),
        (OSError(), "cannot read p: OSError"),
    ],
)
def test_describe_error(error: OSError, expected: str) -> None:
    assert files.describe_error(error, "read", Path("p")) == expected


def test_errors_of_other_kinds_pass_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.clear_errors("read", tmp_path):
        raise KeyError("x")


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_sync_folder_forgives_only_file_systems_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        files.sync_folder(tmp_path)


def test_remove_partials_removes_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_text(OLD)
    (tmp_path / ".b.partial" / "inner").mkdir(parents=True)
    (tmp_path / "c.partial").write_text(OLD)
    (tmp_path / ".d").write_text(OLD)
    files.remove_partials(tmp_path)
    assert sorted(found.name for found in tmp_path.iterdir()) == [".d", "c.partial"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_490_000_000, "1.5 GB"), (2 * 10**15, "2000.0 TB")],
)
def test_readable_size(count: int, text: str) -> None:
    assert files.readable_size(count) == text
