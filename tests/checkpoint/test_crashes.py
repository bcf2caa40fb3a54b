"""A full disk, an unwritable folder, a kill: at whatever moment of saving, nothing is lost and the run goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.checkpoint import checkpoint
from cllm_gpu.checkpoint.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from cllm_gpu.utils.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No waiting for the disk: that it is asked to sync, and when, is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


def make(step: int, seed: int = 0) -> Checkpoint:
    """A small checkpoint whose numbers depend on the step and the seed."""
    weights = {"w": np.random.default_rng([step, seed]).standard_normal((3, 5))}
    return Checkpoint({}, {}, {}, step, {"seed": seed}, weights, {"first_moment": {"w": -weights["w"]}})


def save(run: Path, step: int, *, keep_last: int = 2, best: bool = False, seed: int = 0) -> Path:
    return save_checkpoint(run, make(step, seed), keep_last=keep_last, best=best)


def equal(a: Checkpoint, b: Checkpoint) -> bool:
    return (
        (a.step, a.state) == (b.step, b.state)
        and np.array_equal(a.parameters["w"], b.parameters["w"])
        and np.array_equal(a.optimizer["first_moment"]["w"], b.optimizer["first_moment"]["w"])
    )


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class Killed(BaseException):
    """The process is gone: nothing it would still do happens."""


class Disk:
    """Counts what is done to the disk, and from the call `stop` on fails: once with an OSError, or for good."""

    CALLS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")

    def __init__(self, patch: pytest.MonkeyPatch, stop: int, error: Callable[[], BaseException]) -> None:
        self.done: list[str] = []
        self.stop, self.error = stop, error
        for name in self.CALLS:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    @property
    def stopped(self) -> bool:
        return len(self.done) > self.stop

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.done.append(name)
            position = len(self.done) - 1
            error = self.error()
            if position == self.stop or (position > self.stop and isinstance(error, Killed)):
                if name == "write" and position == self.stop:
                    real(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))  # half of it arrives
                raise error
            return real(*arguments, **named)

        return call


def prepare(run: Path) -> None:
    save(run, 100, best=True)
    save(run, 200)


def check_usable(run: Path, step: int) -> bool:
    """The run loads, as it was before the save of `step` or as it is after it; whether it is as after."""
    loaded = load_checkpoint(run)
    new = equal(loaded, make(step, seed=1))
    assert new or equal(loaded, make(200))
    assert load_model(run).step in ((100, step) if new else (100,))
    return new


def die_while_writing(run: Path) -> None:
    """The next save dies too, after it has cleared away what the first left."""

    def die(*arguments: Any) -> int:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", die)
        with pytest.raises(Killed):
            save(run, 400)


def check_goes_on(run: Path) -> None:
    """A later save works and clears away whatever was left."""
    save(run, 400)
    assert equal(load_checkpoint(run), make(400))
    assert all(name.startswith("step_") for name in names(run))
    assert len(names(run)) <= 3


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("step", [300, 200], ids=["next", "same"])
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path, step: int, best: bool) -> None:
    outcomes = []
    for stop in range(1000):
        run = tmp_path / str(stop)
        prepare(run)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, stop, Killed)
            with contextlib.suppress(Killed):
                save(run, step, keep_last=1, best=best, seed=1)
        if not disk.stopped:
            break
        outcomes.append((disk.done[stop], check_usable(run, step)))
        die_while_writing(run)
        assert check_usable(run, step) is outcomes[-1][1]
        check_goes_on(run)
    after = [new for _, new in outcomes]
    assert after == sorted(after), "once the new checkpoint is there it stays"
    assert {True, False} <= set(after)
    assert {"mkdir", "write", "fsync", "rename", "unlink"} <= {name for name, _ in outcomes}


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"no space left on the disk of .*step_\d+: needs .*B, .* are free; free some or .*"),
        (errno.EACCES, r"cannot write .*step_\d+: no permission; choose .*"),
        (errno.EIO, rf"cannot write .*step_\d+: {os.strerror(errno.EIO)}"),
    ],
)
@pytest.mark.parametrize("step", [300, 200], ids=["next", "same"])
def test_an_error_at_any_moment_loses_nothing(tmp_path: Path, step: int, number: int, message: str) -> None:
    failed = set()
    for stop in range(1000):
        run = tmp_path / str(stop)
        prepare(run)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, stop, lambda: OSError(number, os.strerror(number)))
            told = ""
            try:
                save(run, step, keep_last=1, best=True, seed=1)
            except UserError as error:
                told = str(error)
        if not disk.stopped:
            break
        if told:
            failed.add(disk.done[stop])
            assert re.fullmatch(message, told), told
            assert all(name.startswith("step_") for name in names(run))
        check_usable(run, step)
        check_goes_on(run)
    assert {"mkdir", "write", "fsync", "rename"} <= failed


def test_everything_is_synced_before_the_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, 10**9, Killed)
    save(tmp_path, 1)
    calls = disk.done[disk.done.index("write") :]
    renamed = calls.index("rename")
    assert calls[renamed - 1] == "fsync"
    folder = os.name != "nt"  # Windows syncs no folders
    assert calls[:renamed].count("fsync") == len(FILES) + folder
    assert calls[renamed + 1 :].count("fsync") == folder
    assert "write" not in calls[renamed:]


def test_the_folder_of_the_run_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match=r"cannot write .*: a file is where a folder is needed"):
        save(tmp_path / "run", 1)


KILL = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from {module} import make
from cllm_gpu.checkpoint.checkpoint import save_checkpoint
real, left = getattr(os, {call!r}), [{count}]
def die(*arguments, **named):
    left[0] -= 1
    if left[0] < 0:
        os._exit(77)
    return real(*arguments, **named)
setattr(os, {call!r}, die)
save_checkpoint(Path({run!r}), make(300, 1), keep_last=1, best=True)
"""


def test_a_process_that_dies_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    """In the middle of the writing, before the rename, and in the middle of removing old ones."""
    moments = {("write", 3): False, ("rename", 0): False, ("unlink", 1): True}
    processes = []
    for call, count in moments:
        run = tmp_path / f"{call}{count}"
        prepare(run)
        path = [str(Path(__file__).parent), str(Path(checkpoint.__file__).parents[2])]
        code = KILL.format(path=path, module=Path(__file__).stem, call=call, count=count, run=str(run))
        processes.append(subprocess.Popen([sys.executable, "-c", code]))
    assert [process.wait(60) for process in processes] == [77] * len(moments)
    for (call, count), after in moments.items():
        run = tmp_path / f"{call}{count}"
        assert check_usable(run, 300) is after
        check_goes_on(run)
