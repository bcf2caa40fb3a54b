"""TensorBoard events: the figures of the metrics under their names, and a resumed run's without what was undone."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from cllm_gpu.cli import run
from cllm_gpu.devices.host_memory import anonymous_bytes
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.reporter import Silent
from cllm_gpu.training.tensorboard import EVALUATION, MEMORY, STEP, Events, events, require_tensorboard
from cllm_gpu.utils.errors import UserError


def read_events(folder: Path) -> list[Any]:
    """Every event of every file: records of length, checksum, protocol buffer, checksum."""
    protocol = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(protocol.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    return {(v.tag, e.step): v.simple_value for e in read_events(folder) for v in e.summary.value}


def test_a_run_s_events_are_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path / "cache"))
    Path("text.txt").write_text("".join(f"{i} and {i * i}\n" for i in range(300)), encoding="utf-8")
    flags = ["--data.source", "text.txt", "--model.size", "tiny", "--model.layers", "1", "--model.width", "16",
             "--model.context", "16", "--training.batch", "4", "--training.evaluate-every", "2",
             "--training.evaluation-batches", "1", "--training.sample-tokens", "0", "--backend", "numpy"]  # fmt: skip
    assert run(["train", *flags, "--training.steps", "3", "--training.tensorboard"]) == 0
    assert run(["train", "--resume", "--training.steps", "4"]) == 0  # goes on writing events unasked
    found = scalars(tmp_path / "runs" / "001" / "tensorboard")
    memory = {step: found.pop((tag, step)) for tag, step in list(found) if tag == MEMORY}
    assert set(memory) == ({1, 2, 3, 4} if anonymous_bytes() else set()), "of every step, where the system tells"
    assert all(value > 0 for value in memory.values())
    expected = {}
    for record in read_metrics(tmp_path / "runs" / "001" / "metrics.jsonl"):
        for name, tag in (STEP if record["kind"] == "step" else EVALUATION).items():
            if name in record:
                expected[tag, record["step"]] = record[name]
    assert {step for tag, step in expected if tag == "loss/training"} == {1, 2, 3, 4}
    assert {step for tag, step in expected if tag == "loss/validation"} == {2, 3, 4}
    assert found == pytest.approx(expected, rel=1e-6)  # events hold float32


def test_what_a_resumed_run_does_again_is_forgotten(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for done in (0, 5):
        with events(tmp_path, done, Silent(), lambda: None):
            pass
    starts = [e.step for e in read_events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert starts == [6]


class Recorder:
    """Stands for a writer and for the next reporter: what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalar(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    step = evaluation = message = add_scalar


def test_values_that_are_not_finite_are_left_out_and_everything_is_passed_on() -> None:
    writer, then = Recorder(), Recorder()
    reporter = Events(writer, then, lambda: None)
    step = dict.fromkeys(STEP, 1.0) | {"step": 7, "loss": math.nan, "gradient_norm": math.inf}
    evaluation = dict.fromkeys(EVALUATION, 2.0) | {"step": 7, "bits_per_byte": None}
    reporter.step(step)
    reporter.evaluation(evaluation)
    reporter.message("text")
    assert then.calls == [(step,), (evaluation,), ("text",)]
    kept = [tag for name, tag in STEP.items() if name not in ("loss", "gradient_norm")]
    assert writer.calls[: len(kept)] == [(tag, 1.0, 7) for tag in kept]
    assert [tag for tag, *_ in writer.calls[len(kept) :]] == [EVALUATION[n] for n in ("loss", "perplexity", "accuracy")]


def test_of_a_card_there_are_mfu_memory_and_power() -> None:
    writer = Recorder()
    reporter = Events(writer, Recorder(), lambda: 5 << 30)
    plain = {"step": 3, "loss": 1.0, "tokens_per_second": 2e5}
    reporter.step(plain)
    assert {tag for tag, *_ in writer.calls} == {"loss/training", "speed/tokens_per_second", "memory/bytes"}
    writer.calls.clear()
    reporter.step(plain | {"mfu": 0.5, "watts": 600.0, "joules_per_token": 3e-3})
    found = {tag: (value, step) for tag, value, step in writer.calls}
    assert found == {
        "loss/training": (1.0, 3), "speed/tokens_per_second": (2e5, 3), "speed/mfu": (0.5, 3),
        "power/watts": (600.0, 3), "power/joules_per_token": (3e-3, 3), "memory/bytes": (5 << 30, 3),
    }  # fmt: skip


def test_without_tensorboardx_one_line_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'cllm-gpu\[tensorboard\]'"):
        require_tensorboard()
    assert run(["train", "--training.tensorboard"]) == 2
    assert "cllm-gpu[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="cannot write"), events(tmp_path, 0, Silent(), lambda: None):
        pass
