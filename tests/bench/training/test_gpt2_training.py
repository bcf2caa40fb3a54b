"""Training beside PyTorch: the rehearsal, the bars, what is wrong and said so, and how processes are run and read."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench.gpu_check import machine
from bench.gpu_check.subprocesses import Finished, module, run_program
from bench.training import gpt2_process, gpt2_training
from bench.training.gpt2_process import (
    CHECKED,
    REHEARSED,
    SIZES,
    WINDOWS,
    Energy,
    Size,
    empty_row,
    random_tokens,
    windows,
)
from bench.training.gpt2_targets import ALIKE, best, failures, training_bars
from bench.training.step_profile import empty_profile
from cllm_gpu.devices import driver as gpu
from cllm_gpu.model.flops import flop_per_token
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.utils.compiler import find_compiler
from tests.bench.fakes import MACHINE

VOCABULARIES = {name: size.vocabulary for name, size in SIZES.items()}


def row(side: Any, size: str, batch: int, speed: float | None = None, held: int | None = None, **more: Any) -> Any:
    return empty_row(side, size, batch) | {"tokens_per_second": speed, "held_bytes": held} | more


def falling(size: str, *, factor: float = 1.0) -> list[float]:
    start = math.log(VOCABULARIES[size])
    return [start * (1 - 0.01 * step) * (factor if step else 1.0) for step in range(CHECKED)]


def parameters(size: Size) -> int:
    return Layout(parameter_specs(size.architecture()), np.float32).count


@pytest.mark.skipif(find_compiler() is None, reason="the simulator needs a C++ compiler")
def test_the_rehearsal_trains_both_sides_alike_and_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    status = gpt2_training.main(["--rehearse", "--sizes", "10M", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "wrong" not in printed
    assert printed.count("10M    4  ") == (2 if importlib.util.find_spec("torch") else 1)
    assert printed.splitlines()[-1] == "rehearsal: nothing was timed, nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_without_a_card_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu, "find_driver", lambda: None)
    assert gpt2_training.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no card: no NVIDIA driver found")
    assert error.count("\n") == 1


def test_a_side_without_memory_goes_on_with_a_smaller_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(side: Any, name: str, batch: int, seconds: float) -> dict[str, Any]:
        return row(side, name, batch, note=gpt2_process.OUT_OF_MEMORY if (side, batch) == ("PyTorch", 64) else "")

    monkeypatch.setattr(gpt2_training, "measure", measure)
    options = gpt2_training.parse(["--sizes", "124M", "--output", str(tmp_path)])
    measurements = gpt2_training.Measurements(options, gpt2_process.SIDES, MACHINE)
    measurements.run()
    found = {side: [r["batch"] for r in measurements.rows if r["side"] == side] for side in gpt2_process.SIDES}
    assert found == {"ours": [64, 32], "PyTorch": [64, 32, 16]}


def test_mfu_is_of_the_peak_that_our_side_knows() -> None:
    rows = [row("ours", "124M", 64, 70e3, peak=(1e15, "made up")), row("PyTorch", "124M", 64, 60e3, peak=None)]
    gpt2_training.add_utilisation([*rows, missing := row("PyTorch", "124M", 32)])
    flop = flop_per_token(SIZES["124M"].architecture())
    assert [r["mfu"] for r in rows] == [70e3 * flop / 1e15, 60e3 * flop / 1e15]
    assert missing["mfu"] is None


def test_a_loss_that_is_no_number_is_written_as_null_and_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    losses = [*falling("10M")[:3], *[math.nan] * (CHECKED - 3)]
    monkeypatch.setattr(gpu, "missing", lambda driver, has_cupy: None)
    monkeypatch.setattr(gpt2_training, "measure", lambda side, name, batch, _: row(side, name, batch, losses=losses))
    monkeypatch.setattr(machine, "facts", lambda: MACHINE)
    assert gpt2_training.main(["--no-torch", "--sizes", "10M", "--output", str(tmp_path)]) == 1
    assert "wrong: ours, 10M, B=4: the loss does not fall" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text(encoding="utf-8"))["rows"][0]["losses"][2:4] == [losses[2], None]


def test_what_is_out_of_time_is_not_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpt2_training, "measure", lambda *arguments: pytest.fail("begun"))
    monkeypatch.setattr(gpt2_training, "measure_profile", lambda *arguments: pytest.fail("begun"))
    options = gpt2_training.parse(["--minutes", "0.01", "--sizes", "10M", "124M", "--output", str(tmp_path)])
    measurements = gpt2_training.Measurements(options, ("ours",), MACHINE)
    measurements.run()
    rows = [(r["size"], r["batch"], r["note"]) for r in measurements.rows]
    assert rows == [(*which, gpt2_training.LEFT_OUT) for which in (("10M", 4), ("124M", 64), ("124M", 32))]
    assert measurements.profile is None, "no best batch is known"


@pytest.mark.parametrize(
    ("finished", "note"),
    [
        (Finished(0, "x\n" + json.dumps(empty_profile("124M", 64)) + "\ny\n", 1.0), ""),
        (Finished(124, "", 1.0), gpt2_training.LEFT_OUT),
        (Finished(1, "Traceback\nValueError: no\n", 1.0), "failed: ValueError: no"),
        (Finished(0, "nothing\n", 1.0), "failed: nothing"),
    ],
)
def test_a_profile_is_read_or_says_how_it_ended(monkeypatch: pytest.MonkeyPatch, finished: Finished, note: str) -> None:
    monkeypatch.setattr(gpt2_training, "run_program", lambda command, seconds, log: finished)
    assert gpt2_training.measure_profile("124M", 64, 30.0) == empty_profile("124M", 64, note)


def test_what_pytorch_cannot_compile_is_shown_and_no_bar_is_held_against_it() -> None:
    torch = SimpleNamespace(compile=lambda function, dynamic: function, ones=lambda size, device: np.ones(size))
    assert gpt2_process.compiler_trouble(torch) is None

    def no_compiler(function: Any, dynamic: bool) -> Any:
        raise RuntimeError("Failed to find C compiler\nmore")

    note = gpt2_process.compiler_trouble(SimpleNamespace(compile=no_compiler, ones=torch.ones))
    assert note == "not compiled: RuntimeError: Failed to find C compiler"
    rows = [row("ours", "10M", 4, 2.0, 100), row("PyTorch", "10M", 4, 1.0, 200, note=note)]
    bars = {bar.what: bar.verdict for bar in training_bars(rows, "x")}
    assert bars["10M against PyTorch"] == bars["PyTorch's memory over ours, 10M"] == "not measured"
    assert failures(rows, VOCABULARIES) == []


def test_a_process_is_read_by_its_row_or_by_how_it_ended() -> None:
    good = json.dumps(row("ours", "10M", 4, 1.0))
    assert gpt2_training.row_of(Finished(0, f"a message\n{good}\nlast words\n", 1.0), "ours", "10M", 4) == json.loads(
        good
    )
    late = gpt2_training.row_of(Finished(124, "", 1.0), "ours", "10M", 4)
    assert (late["note"], late["tokens_per_second"]) == (gpt2_training.LEFT_OUT, None)
    silent = gpt2_training.row_of(Finished(0, "nothing\n", 1.0), "ours", "10M", 4)
    assert silent["note"] == "failed: printed no row"
    failed = gpt2_training.row_of(Finished(1, "Traceback\nValueError: no\n", 1.0), "ours", "10M", 4)
    assert failed["note"] == "failed: ValueError: no"
    assert failures([failed], VOCABULARIES) == ["ours, 10M, B=4: failed: ValueError: no"]


@pytest.mark.skipif(find_compiler() is None, reason="the simulator needs a C++ compiler")
def test_a_process_of_its_own_gives_the_row(tmp_path: Path) -> None:
    done = run_program(module("bench.training.gpt2_process", "ours", "10M", "4", "--rehearse"), 300, tmp_path / "log")
    found = gpt2_training.row_of(done, "ours", "10M", 4)
    assert (found["note"], found["tokens_per_second"], len(found["losses"])) == ("", None, CHECKED)


@pytest.mark.parametrize(("kind", "text"), [("OutOfMemoryError", "x"), ("RuntimeError", "CUDA out of memory. Tried")])
def test_out_of_memory_is_a_note_and_other_errors_are_errors(
    monkeypatch: pytest.MonkeyPatch, kind: str, text: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise type(kind, (Exception,), {})(text)

    monkeypatch.setitem(gpt2_process.TRAIN, "ours", fail)
    found = gpt2_process.measure_side("ours", "124M", 16, rehearse=True)
    assert found["note"] == gpt2_process.OUT_OF_MEMORY
    kind, text = "ValueError", "no"
    with pytest.raises(Exception, match="no"):
        gpt2_process.measure_side("ours", "124M", 16, rehearse=True)


def test_bars() -> None:
    rows = [
        row("ours", "124M", 32, 400_000.0, 80), row("ours", "124M", 64, 600_000.0, 170),
        row("PyTorch", "124M", 32, 500_000.0, 100), row("PyTorch", "124M", 64, None),
        row("ours", "10M", 4, 150.0), row("PyTorch", "10M", 4, 100.0),
    ]  # fmt: skip
    verdicts = {bar.what: (bar.measured, bar.verdict) for bar in training_bars(rows, "NVIDIA H200")}
    assert verdicts == {
        "124M against PyTorch, B=64 and B=32": (1.2, "reached"),
        "350M against PyTorch": (None, "not measured"),
        "10M against PyTorch, B=4 and B=4": (1.5, "below"),
        "PyTorch's memory over ours, 124M, B=32": (1.25, "reached"),
        "PyTorch's memory over ours, 350M": (None, "not measured"),
        "PyTorch's memory over ours, 10M": (None, "not measured"),
        "124M at its best batch": (600.0, "reached"),
    }
    assert "124M at its best batch" not in {bar.what for bar in training_bars(rows, "NVIDIA A100")}
    assert best(rows, "ours", "350M") is None


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (falling("10M"), []),
        (falling("10M", factor=1 + 0.9 * ALIKE), []),
        (falling("10M", factor=1 + 1.1 * ALIKE), ["the loss differs from PyTorch's from step 2 on"]),
        ([math.nan] * CHECKED, ["first loss is nan", "does not fall", "differs from PyTorch's from step 1 on"]),
        ([math.log(256)] * CHECKED, ["does not fall", "differs from PyTorch's from step 3 on"]),
        ([1.1 * loss for loss in falling("10M")], ["first loss is 6.0997", "differs from PyTorch's from step 1 on"]),
    ],
)
def test_sides_that_do_not_train_alike_are_wrong(ours: list[float], said: list[str]) -> None:
    rows = [row("ours", "10M", 4, losses=ours), row("PyTorch", "10M", 4, losses=falling("10M"))]
    found = failures(rows, VOCABULARIES)
    assert len(found) == len(said)
    for text, line in zip(said, found, strict=True):
        assert text in line
        assert line.startswith("ours, 10M, B=4: ")


def test_energy_is_between_the_first_and_the_last_reading() -> None:
    found = iter((100.0, 700.0, None))
    meter: Any = SimpleNamespace(joules=lambda: next(found))
    energy = Energy(meter)
    energy.read()
    assert energy.joules is None
    energy.read()
    assert energy.joules == 600.0
    energy.read()
    assert energy.joules is None, "a reading that failed"
    nothing = Energy(None)
    nothing.read()
    nothing.read()
    assert nothing.joules is None


def test_power_is_of_the_timed_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpt2_process.Run([5.0], [2.0] * WINDOWS, None, "x", joules=3000.0)
    monkeypatch.setitem(gpt2_process.TRAIN, "ours", lambda size, batch, rehearse: run)
    found = gpt2_process.measure_side("ours", "10M", 4, rehearse=False)
    tokens = WINDOWS * 4 * 256 * SIZES["10M"].window_steps(4)
    assert (found["watts"], found["joules_per_token"]) == (3000.0 / (2.0 * WINDOWS), 3000.0 / tokens)
    read: list[int] = []
    energy: Any = SimpleNamespace(read=lambda: read.append(len(clock.times)))
    clock = gpt2_process._Clock(energy, CHECKED + WINDOWS * 3)
    for _ in range(CHECKED + WINDOWS * 3):
        clock.step({"loss": 1.0})
    assert read == [CHECKED, CHECKED + WINDOWS * 3]
    assert len(windows(clock.times, 3)) == WINDOWS


def test_windows_and_sizes() -> None:
    times = [10.0 * step for step in range(CHECKED)] + [1000.0 + step for step in range(7 * WINDOWS)]
    first, *others = windows(times, 7)
    assert others == [7.0] * (WINDOWS - 1)
    assert first == 1006.0 - 10.0 * (CHECKED - 1)
    assert SIZES["10M"].batches == (4,)
    assert SIZES["10M"].context == 256
    assert SIZES.keys() == REHEARSED.keys()
    for name, millions in (("124M", 124), ("350M", 355), ("10M", 10.8)):
        assert math.isclose(parameters(SIZES[name]) / 1e6, millions, rel_tol=0.01)


def test_random_tokens_are_the_same_every_time_skewed_and_in_the_vocabulary() -> None:
    size = SIZES["124M"]
    one, other = (random_tokens(size, 10_000).read(0, 10_000) for _ in range(2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, random_tokens(size, 10_000, seed=5).read(0, 10_000))
    assert one.min() >= 0
    assert size.vocabulary / 2 < one.max() < size.vocabulary
    assert 0.4 < np.mean(one < size.vocabulary / 8) < 0.6  # u³ < 1/8 for half of all u


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_pytorchs_model_has_our_parameters() -> None:
    from bench.training.nanogpt import NanoGPT

    architecture = REHEARSED["10M"].architecture()
    count = sum(p.numel() for p in NanoGPT(architecture).parameters())
    assert count == parameters(REHEARSED["10M"])
