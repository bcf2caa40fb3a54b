"""The metrics log: exact numbers, whole lines, and a resumed run's file equal to an uninterrupted one's."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_gpu.training.metrics import MetricsLog, read_metrics
from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def record(step: int) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": 1.0 / (step + 3), "skipped": None}


def exact(value: Any) -> Any:
    """A form in which equal means equal to the bit, and NaN equals NaN."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value.hex()
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return (type(value), value)


@given(PLAIN)
def test_json_gives_back_what_went_in(value: Any) -> None:
    text = exact_json.dumps(value)
    assert exact(exact_json.loads(text)) == exact(value)
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not standard JSON"))
    assert "\n" not in text


def test_json_takes_numpy_numbers_and_refuses_what_would_change() -> None:
    assert exact_json.loads(exact_json.dumps({"a": np.float32(0.1), "b": np.int64(7), "c": np.float64("inf")})) == {
        "a": float(np.float32(0.1)),
        "b": 7,
        "c": math.inf,
    }
    with pytest.raises(TypeError, match="keys must be strings"):
        exact_json.dumps({1: 2})
    with pytest.raises(ValueError, match="marks floats"):
        exact_json.dumps({"$float": "inf"})
    with pytest.raises(TypeError):
        exact_json.dumps({"a": object()})
    for bad in ('{"$float": "1"}', '{"$float": [1]}', "[" * 100_000, "{"):
        with pytest.raises(ValueError, match=r"."):
            exact_json.loads(bad)


def test_each_record_is_a_line_in_the_file_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    for step in range(1, 4):
        log.append(record(step))
        assert read_metrics(log.path) == [record(done) for done in range(1, step + 1)]
    assert log.path.read_bytes().count(b"\n") == 3
    log.sync()


def test_non_finite_losses_come_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": math.nan, "norm": -math.inf})
    (found,) = read_metrics(log.path)
    assert math.isnan(found["loss"])
    assert found["norm"] == -math.inf


@pytest.mark.parametrize("torn", [b"", b'{"kind":"st', b'{"kind":"step","step":9,"loss":1.5}'])
@pytest.mark.parametrize("stopped_at", [0, 4, 6])
def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path: Path, torn: bytes, stopped_at: int) -> None:
    whole, resumed = MetricsLog(tmp_path / "whole.jsonl"), MetricsLog(tmp_path / "resumed.jsonl")
    for step in range(1, 11):
        whole.append(record(step))
    for step in range(1, 7):
        resumed.append(record(step))
    with open(resumed.path, "ab") as file:
        file.write(torn)
    assert read_metrics(resumed.path) == [record(step) for step in range(1, 7)]
    resumed.truncate_after(stopped_at)
    for step in range(stopped_at + 1, 11):
        resumed.append(record(step))
    assert resumed.path.read_bytes() == whole.path.read_bytes()


def test_truncation_keeps_records_without_a_step_and_needs_no_file(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(3)
    assert not log.path.exists()
    log.append({"kind": "note"})
    log.append(record(4))
    log.truncate_after(3)
    assert read_metrics(log.path) == [{"kind": "note"}]


def test_truncation_on_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        log.append(record(step))

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="no space left"):
            log.truncate_after(2)
    assert read_metrics(log.path) == [record(1), record(2), record(3)]


def test_bad_files_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="it does not exist"):
        read_metrics(path)
    for bad in (b"\xff\xfe\n", b"[1]\n", b'{"a":\n'):
        path.write_bytes(b'{"step":1}\n' + bad + b'{"step":2}\n')
        with pytest.raises(UserError, match="line 2 is not a JSON object"):
            read_metrics(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path / "folder").append({"step": 1})

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="no permission"):
        MetricsLog(path).append({"step": 1})
