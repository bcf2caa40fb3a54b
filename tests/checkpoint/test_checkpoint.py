"""Checkpoints: every bit comes back, whatever is not what was written is refused, and nothing is ever lost."""

from __future__ import annotations

import errno
import json
import math
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm_gpu.checkpoint.checkpoint import (
    Checkpoint,
    best_checkpoint,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    save_checkpoint,
)
from cllm_gpu.checkpoint.manifest import VERSION, Manifest, manifest_text
from cllm_gpu.utils.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "manifest.json")
STATE = {"best": math.inf, "norm": -math.inf, "loss": math.nan, "rate": 0.1 + 0.2, "seen": 2**70, "window": [1e-320]}


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No waiting for the disk; test_checkpoint_crashes.py looks at what is synced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


def make(step: int, seed: int = 0) -> Checkpoint:
    """A small checkpoint whose numbers depend on the step and the seed."""
    generator = np.random.default_rng([step, seed])

    def arrays() -> dict[str, Any]:
        return {
            "w": generator.standard_normal((3, 5)).astype(np.float32),
            "b": generator.standard_normal(3),
            "h": generator.standard_normal(7).astype(ml_dtypes.bfloat16),
        }

    parameters, first = arrays(), arrays()
    squares = {name: np.abs(array) for name, array in arrays().items()}
    return Checkpoint(
        config={"model": {"size": "tiny"}},
        architecture={"width": 5},
        tokenizer={"kind": "bytes", "end": "é\u2028"},
        step=step,
        state={**STATE, "seed": seed},
        parameters=parameters,
        optimizer={"first_moment": first, "second_moment": squares, "empty": {}},
    )


def fingerprint(checkpoint: Checkpoint) -> Any:
    """Equal fingerprints mean equal bits, dtypes and shapes, NaN included."""

    def of(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in sorted(arrays.items())}

    plain = (checkpoint.config, checkpoint.architecture, checkpoint.tokenizer, checkpoint.state)
    moments = {moment: of(arrays) for moment, arrays in checkpoint.optimizer.items()}
    return checkpoint.step, repr(plain), of(checkpoint.parameters), moments


def save(run: Path, step: int, *, keep_last: int = 2, best: bool = False, seed: int = 0) -> Path:
    return save_checkpoint(run, make(step, seed), keep_last=keep_last, best=best)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# ---- what goes in comes out


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    folder = save(tmp_path, 1000)
    assert folder == tmp_path / "checkpoints" / "step_00001000"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert names(tmp_path) == ["step_00001000"]
    for path in (folder, folder.parent, tmp_path):
        assert fingerprint(load_checkpoint(path)) == fingerprint(make(1000))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "uint8"]),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32),
)
def test_any_bits_of_any_dtype_and_shape_come_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: list[int], seed: int
) -> None:
    kind = np.dtype(dtype)  # "bfloat16" is known to NumPy once ml_dtypes is imported
    bits = np.random.default_rng(seed).bytes(math.prod(shape) * kind.itemsize)
    array = np.frombuffer(bits, dtype=kind).reshape(shape).copy()
    if kind.kind not in "iub":
        array[~np.isfinite(array)] = 0  # what is not finite is refused
    checkpoint = Checkpoint({}, {}, {}, 1, {}, {"x": array, "first": np.arange(3, dtype=np.uint8)}, {"m": {"x": array}})
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, checkpoint, keep_last=1, best=False)
    assert fingerprint(load_checkpoint(run)) == fingerprint(checkpoint)


def test_arrays_that_are_not_contiguous_or_big_endian_keep_their_values(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"t": base.T, "s": base[::2, 1::3], "r": base[::-1], "e": base.astype(">f4")}
    save_checkpoint(tmp_path, Checkpoint({}, {}, {}, 1, {}, arrays, {}), keep_last=1, best=False)
    loaded = load_checkpoint(tmp_path).parameters
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=name != "e")


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    wrong = Checkpoint({}, {}, {}, 1, {}, {"z": np.zeros(2, np.complex128)}, {})
    with pytest.raises(TypeError, match="z is of dtype complex128"):
        save_checkpoint(tmp_path, wrong, keep_last=1, best=False)
    assert not (tmp_path / "checkpoints").exists() or names(tmp_path) == []


def test_state_that_is_not_plain_data_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, Checkpoint({}, {}, {}, 1, {"x": object()}, {}, {}), keep_last=1, best=False)
    assert names(tmp_path) == []


def test_other_tools_read_the_weights(tmp_path: Path) -> None:
    values = {"b": np.arange(3.0), "a": np.arange(5, dtype=np.float32), "c": np.array(7, dtype=np.int16)}
    save_checkpoint(tmp_path, Checkpoint({}, {}, {}, 1, {}, values, {}), keep_last=1, best=False)
    path = tmp_path / "checkpoints" / "step_00000001" / "model.safetensors"
    found = safetensors.numpy.load_file(path)
    assert found.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, array in values.items():
        assert (8 + length + header[name]["data_offsets"][0]) % array.dtype.itemsize == 0


def test_saving_holds_no_second_copy(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.zeros(1 << 20, dtype=np.float32) for i in range(8)}
    checkpoint = Checkpoint({}, {}, {}, 1, {}, arrays, {"first_moment": arrays})
    tracemalloc.start()
    try:
        save_checkpoint(tmp_path, checkpoint, keep_last=1, best=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < arrays["w0"].nbytes // 4, f"{peak} bytes beside {8 * arrays['w0'].nbytes} bytes of weights"


# ---- which are kept and found


def test_the_newest_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert best_checkpoint(tmp_path) is None
    for step in range(100, 700, 100):
        save(tmp_path, step, best=step in (100, 200))
    assert names(tmp_path) == ["step_00000200", "step_00000500", "step_00000600"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000600"
    assert best_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000200"
    assert load_checkpoint(tmp_path).step == 600
    assert load_model(tmp_path).step == 200
    assert load_model(tmp_path, which="last").step == 600
    save(tmp_path, 700, best=True, keep_last=0)
    assert names(tmp_path) == ["step_00000700"]


@settings(max_examples=15, deadline=None)
@given(saves=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=7), keep_last=st.integers(0, 3))
def test_any_course_of_saves_keeps_what_it_should(
    tmp_path_factory: pytest.TempPathFactory, saves: list[tuple[int, bool]], keep_last: int
) -> None:
    """Also when a run goes back to an earlier step: what came after it is given up."""
    run = tmp_path_factory.mktemp("run")
    kept: dict[int, bool] = {}
    for number, (step, best) in enumerate(saves):
        save(run, step, keep_last=keep_last, best=best, seed=number)
        kept = {other: flag for other, flag in kept.items() if other < step} | {step: best}
        newest = sorted(kept)[-max(1, keep_last) :]
        best_steps = [other for other, flag in kept.items() if flag]
        kept = {other: kept[other] for other in sorted({*newest, *([max(best_steps)] if best_steps else [])})}
        assert names(run) == [f"step_{other:08d}" for other in kept]
        assert fingerprint(load_checkpoint(run)) == fingerprint(make(step, number))
        assert load_model(run).step == max(best_steps, default=step)


def test_load_model_needs_no_optimizer(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "optimizer.safetensors").unlink()
    model = load_model(folder)
    assert model.optimizer == {}
    assert fingerprint(model)[:3] == fingerprint(make(5))[:3]
    with pytest.raises(UserError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(folder)


def test_a_run_whose_newest_is_incomplete_goes_on_from_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    with open(newest / "optimizer.safetensors", "r+b") as file:
        file.truncate(40)
    assert load_checkpoint(tmp_path).step == 1
    with pytest.raises(UserError, match=r"optimizer\.safetensors is truncated: 40 bytes instead of"):
        load_checkpoint(newest)


# ---- bad input


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    for name in FILES:
        path = folder / name
        sound = path.read_bytes()
        for offset in range(len(sound)):
            changed = sound[offset] ^ (1 << offset % 8)
            path.write_bytes(sound[:offset] + bytes([changed]) + sound[offset + 1 :])
            with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
                load_checkpoint(folder)
            one_line(error)
        path.write_bytes(sound)
    assert fingerprint(load_checkpoint(folder)) == fingerprint(make(3))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = save(tmp_path_factory.mktemp("run"), 3)
    return folder, {name: (folder / name).read_bytes() for name in FILES}


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(FILES),
    where=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 40),
    inserted=st.binary(max_size=40),
)
def test_any_change_of_any_file_is_found(
    sound: tuple[Path, dict[str, bytes]], name: str, where: float, removed: int, inserted: bytes
) -> None:
    folder, contents = sound
    before = contents[name]
    offset = int(where * len(before))
    after = before[:offset] + inserted + before[offset + removed :]
    (folder / name).write_bytes(after)
    try:
        if after == before:
            load_checkpoint(folder)
        else:
            with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
                load_checkpoint(folder)
            one_line(error)
    finally:
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files(sound: tuple[Path, dict[str, bytes]], name: str) -> None:
    folder, contents = sound
    for length in (0, 1, 7, 8, 9, len(contents[name]) // 2, len(contents[name]) - 1):
        (folder / name).write_bytes(contents[name][:length])
        with pytest.raises(UserError, match=rf"{name} is (truncated|damaged)") as error:
            load_checkpoint(folder)
        one_line(error)
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: the checkpoint is incomplete"):
        load_checkpoint(folder)
    with pytest.raises(UserError, match=rf"{name} is missing"):  # the only one of its run: told what is wrong with it
        load_checkpoint(folder.parent.parent)
    (folder / name).write_bytes(contents[name])


def test_a_newer_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    monkeypatch.setattr("cllm_gpu.checkpoint.manifest.VERSION", VERSION + 1)
    content: dict[str, Any] = {"config": {}, "architecture": {}, "tokenizer": {}, "state": {}}
    path.write_bytes(manifest_text(Manifest(1, False, [], {}, content)))
    monkeypatch.undo()
    for text in (path.read_bytes(), b'{"format": "cllm-gpu checkpoint", "version": 7, "sha256": "elsewhere"}'):
        path.write_bytes(text)
        with pytest.raises(UserError, match=rf"version \d; this cllm-gpu reads up to {VERSION}: install") as error:
            load_checkpoint(folder)
        one_line(error)


def test_paths_that_hold_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "bare").mkdir()
    safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / "bare" / "model.safetensors")
    expected = {
        "nowhere": "does not exist; give the folder",
        "file": "is a file; give the folder",
        "empty": "holds no checkpoint: expected",
        "empty/checkpoints": "holds no checkpoint: expected",
        "other": "holds no checkpoint: expected",
        "bare": r"manifest\.json is missing",
    }
    loaders: list[Callable[[Path], Checkpoint]] = [load_checkpoint, load_model]
    for name, message in expected.items():
        for load in loaders:
            with pytest.raises(UserError, match=message) as error:
                load(tmp_path / name)
            one_line(error)

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot read .*checkpoints: no permission"):
        load_checkpoint(tmp_path / "empty")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["parameters", "first_moment", "second_moment"])
def test_what_is_not_finite_is_not_saved_and_takes_no_place(tmp_path: Path, where: str, bad: float) -> None:
    save_checkpoint(tmp_path, make(1), keep_last=1, best=False)
    spoilt = make(2)
    (spoilt.parameters if where == "parameters" else spoilt.optimizer[where])["h"][3] = bad
    with pytest.raises(UserError, match=r"^checkpoint of step 2: .*h holds numbers that are not finite"):
        save_checkpoint(tmp_path, spoilt, keep_last=1, best=True)
    assert fingerprint(load_checkpoint(tmp_path)) == fingerprint(make(1))


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_moments_that_have_no_root_are_refused(tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = make(1)
    spoilt.optimizer["second_moment"]["w"][1, 2] = bad
    with monkeypatch.context() as patch:
        patch.setattr("cllm_gpu.checkpoint.checkpoint.require_moments", lambda *_: None)
        save_checkpoint(tmp_path, spoilt, keep_last=1, best=False)
    with pytest.raises(UserError, match=r"optimizer\.safetensors: second_moment/w holds .*; use another checkpoint$"):
        load_checkpoint(tmp_path)


def test_checkpoints_of_skipped_steps_take_no_sound_ones_place(tmp_path: Path) -> None:
    for step, skipped in enumerate((0, 0, 3, 4, 5)):
        checkpoint = make(step)
        checkpoint.state["guard"] = {"skipped_in_a_row": skipped}
        save_checkpoint(tmp_path, checkpoint, keep_last=2, best=False)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000000", "step_00000001", "step_00000004"]
