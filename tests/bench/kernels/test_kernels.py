"""bench/kernels: the rehearsal, rows and notes, the result file, the command line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.kernels import __main__ as kernels
from bench.kernels import report
from bench.kernels.jobs import Job, failures, measure
from bench.kernels.targets import PRODUCTS
from bench.kernels.timing import Device
from bench.kernels.torch_side import TorchSide, load_torch
from cllm_gpu.devices import driver
from cllm_gpu.ops.cuda.cublaslt import CublasLt
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.simulator import RawModule
from cllm_gpu.utils.compiler import find_compiler
from tests.bench.fakes import MACHINE, FakeCard
from tests.ops.cuda.lt_stand_in import StandIn

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="not run: the simulator needs a C++ compiler")


class Problem:
    """Ours gives 1, 2, 3; the other side what it is told."""

    name, needs_bytes = "sum", 10

    def __init__(self, other: Any) -> None:
        self.other = other

    def jobs(self, device: Device, torch: TorchSide | None) -> Iterator[Job]:
        def other() -> None:
            if isinstance(self.other, Exception):
                raise self.other

        mine = np.array([1.0, 2.0, 3.0])
        yield Job("sum", "ours", {"n": 3}, lambda: None, 4e9, "TB/s", lambda: mine)
        yield Job("sum", "torch eager", {"n": 3}, other, 4e9, "TB/s", lambda: np.asarray(self.other))


def test_rows_of_a_problem() -> None:
    ours, other = measure(Problem([1.0, 2.0, 3.001]), FakeCard(2.0), None)
    assert ours["milliseconds"] == 2.0
    assert ours["tera_per_second"] == pytest.approx(4e9 / 2e-3 / 1e12)
    assert ours["difference"] is None
    assert other["difference"] == pytest.approx(0.001 / math.sqrt(14), rel=1e-3)  # in float32
    assert other["note"] == ""
    assert failures([ours, other]) == []


@pytest.mark.parametrize("wrong", [[1.0, 2.0, 3.5], [1.0, 2.0, math.nan]])
def test_sides_that_differ_are_trouble(wrong: list[float]) -> None:
    rows = measure(Problem(wrong), FakeCard(), None)
    assert rows[1]["note"].startswith("differs from ours by ")
    assert len(failures(rows)) == 1


def test_a_library_without_a_kernel_is_noted_and_no_trouble() -> None:
    rows = measure(Problem(RuntimeError("no such kernel\nand much more")), FakeCard(), None)
    assert rows[1]["milliseconds"] is None
    assert rows[1]["note"] == "failed: RuntimeError: no such kernel"
    assert failures(rows) == []


def test_our_own_failure_is_trouble() -> None:
    problem = Problem([0.0])
    broken = Job("sum", "ours", {}, lambda: [][0], 1.0, "TB/s", None)
    problem.jobs = lambda device, torch: iter([broken])  # type: ignore[method-assign]
    (line,) = failures(measure(problem, FakeCard(), None))
    assert line == "sum, ours: failed: IndexError: list index out of range"


def test_too_little_memory_is_noted() -> None:
    problem = Problem([0.0])
    problem.needs_bytes = 1 << 40
    (row,) = measure(problem, FakeCard(), None)
    assert row["note"] == "not measured: needs 1099.5 GB of free memory"


def test_a_whole_run_on_a_fake_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every problem at toy sizes with invented times: all bars are found, and the file holds what is printed."""
    for module in kernels.MODULES:
        monkeypatch.setattr(module, "full_problems", module.rehearsal_problems)
    path = tmp_path / "kernels.json"
    options = kernels.parse(["--output", str(path), "--no-torch"])
    assert kernels.run(options, FakeCard(2.0), None, MACHINE) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["machine"] == MACHINE
    copy = next(row for row in content["rows"] if row["kernel"] == "copy ceiling")
    assert content["ceilings"]["copy_terabytes"] == copy["tera_per_second"] == pytest.approx(2 * 4096 / 2e9)
    verdicts = [bar["verdict"] for bar in content["bars"]]
    assert set(verdicts) - {"not measured"}, "no bar found its row"
    printed = capsys.readouterr().out
    assert all(bar["what"] in printed for bar in content["bars"])


def test_a_product_that_cublaslt_refuses_is_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A bar may be missed; a product that was meant for cuBLASLt and did not get there must not go unseen."""
    device = FakeCard()
    lt = CublasLt(StandIn(lacks=frozenset({"BGRADB"})), binding="a stand-in", gelu=True)
    device.launcher = Launcher(np, RawModule, lt=lt)
    options = kernels.parse(["--output", str(tmp_path / "r.json"), "--only", "MLP"])
    for module in kernels.MODULES:
        monkeypatch.setattr(module, "full_problems", module.rehearsal_problems)
    assert kernels.run(options, device, None, MACHINE) == 1
    assert "wrong: cuBLASLt refuses" in capsys.readouterr().out


def test_the_result_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "result.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        report.write_json(path, {"a": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1}


def test_the_rehearsal_runs_every_line(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    assert kernels.main(["--rehearse", "--no-torch"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was timed, nothing was written" in printed
    assert list(tmp_path.iterdir()) == []
    assert "matrix products by NumPy" in printed
    for kernel in ("attention backward", "AdamW", "cross-entropy", "GELU backward", "linear forward", "MLP backward"):
        assert kernel in printed
    assert "logits, loss and gradients" in printed


@pytest.mark.slow
@pytest.mark.witness
@pytest.mark.filterwarnings("ignore")  # of torch
def test_every_side_of_torch_computes_the_same() -> None:
    torch, line = load_torch(np, compile_functions=False)
    if torch is None:
        assert os.environ.get("CLLM_REQUIRE_WITNESS") != "1", line
        pytest.skip(f"not run: {line}")
    rows = [
        row
        for module in kernels.MODULES
        for problem in module.rehearsal_problems()
        for row in measure(problem, FakeCard(), torch)
    ]
    assert failures(rows) == []
    compared = {(row["kernel"], row["side"]) for row in rows if row["difference"] is not None}
    for kernel in ("GELU forward", "GELU backward", "cross-entropy", "layer norm forward", *PRODUCTS):
        assert (kernel, "torch eager") in compared
    assert ("residual + layer norm backward", "torch eager") in compared
    assert {("attention forward", "torch flash"), ("attention backward", "torch flash")} <= compared
    assert {("AdamW", "torch fused"), ("AdamW", "torch foreach")} <= compared


def test_out_of_time_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    for module in kernels.MODULES:
        monkeypatch.setattr(module, "full_problems", module.rehearsal_problems)
    times = iter([0.0, 0.0])
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(times, 1e6))
    options = kernels.parse(["--output", str(tmp_path / "r.json"), "--only", "GELU"])
    assert kernels.run(options, FakeCard(), None, MACHINE) == 0
    assert "not measured: out of time" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--seconds", "-1"], ["--seconds", "nan"], ["--minutes", "x"]])
def test_a_time_that_is_none_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.parse(flags)


def test_without_a_card_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(driver, "find_driver", lambda: None)
    assert kernels.main([]) == 1
    assert capsys.readouterr().err.startswith("error: no card: no NVIDIA driver found")
