"""Every command does its work, from the shell's point of view."""

from __future__ import annotations

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm_gpu.checkpoint.checkpoint import load_checkpoint
from cllm_gpu.config import load_toml
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.files import readable_size
from cllm_gpu.utils.text import visible

Command = Callable[..., tuple[int, str, str]]
Flags = tuple[str, ...]
SMALL_MODEL = pytest.param("small", 4, marks=pytest.mark.slow)


def test_train_generate_evaluate_report(command: Command, workplace: Path, small: Flags) -> None:
    status, out, err = command("train", *small, "--training.steps", "30", "--optimizer.rate", "0.01")
    assert (status, err) == (0, "")
    for shown in ("numpy:", 'source = "text.txt"', "memory plan", "total", "step 30/30", "evaluation at step 30",
                  "memory: planned", "sample:"):  # fmt: skip
        assert shown in out
    folder = workplace / "runs" / "001"
    assert load_toml(folder / "config.toml").optimizer.rate == 0.01
    assert load_checkpoint(folder).step == 30
    steps = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 30
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0

    first = command("generate", "The number", "--tokens", "15", "--seed", "3")
    assert first[0] == 0
    assert first[1].startswith("The number")
    assert command("generate", "The number", "--tokens", "15", "--seed", "3") == first
    uncached = command("generate", "The number", "--tokens", "15", "--seed", "3", "--no-cache")
    assert uncached == first
    greedy = command("generate", "The number", "--temperature", "0", "--tokens", "15")
    assert greedy == command("generate", "The number", "--temperature", "0", "--tokens", "15", "--seed", "9")

    status, out, _ = command("evaluate", "text.txt", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["tokens"] == len((workplace / "text.txt").read_bytes()) + 1  # and the end of text
    assert 0.5 < found["loss"] < steps[0]["loss"]
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] / 0.6931471805599453 * found["tokens"] / (found["tokens"] - 1)
    )
    status, out, _ = command("report", "--output", "tables")
    assert status == 0
    assert "30" in out
    assert (workplace / "tables" / "report.md").is_file()


def test_report_of_a_run_that_was_looked_into(command: Command, workplace: Path, small: Flags) -> None:
    pytest.importorskip("matplotlib")
    flags = (*small, "--training.steps", "4")
    command("train", *flags, "--training.diagnose-every", "2", "--output", "seen")
    command("train", *flags, "--output", "unseen")
    status, out, err = command("report", "seen", "--diagnostics", "layers.png")
    assert (status, err) == (0, "")
    assert "seen: gradients by layer" in out
    assert "3 looks at 4 steps" in out
    assert (workplace / "layers.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = command("report", "seen", "unseen", "--diagnostics", "layers.png")
    assert (status, out) == (2, "")
    assert err == "cllm-gpu: error: unseen has no diagnostics; train with, for example, --training.diagnose-every 50\n"


def test_report_as_a_page(command: Command, workplace: Path, small: Flags) -> None:
    flags = (*small, "--training.steps", "4", "--training.sample-every", "2")
    shown = [command("train", *flags, "--training.seed", seed)[1] for seed in ("1", "2")]
    assert "sample at step 2: " in shown[0]
    assert command("train", "--resume")[0] == 0  # already done: takes its last sample again, keeps it once
    samples = [r for r in read_metrics(workplace / "runs" / "002" / "metrics.jsonl") if r["kind"] == "sample"]
    assert [r["step"] for r in samples] == [2, 4]
    status, out, err = command("report", "runs/001", "runs/002", "--html", "out/page.html")
    assert (status, err) == (0, "")
    assert f"written: {Path('out/page.html')}" in out
    page = (workplace / "out" / "page.html").read_text(encoding="utf-8")
    for part in ("Runs 001, 002", "<h2>Memory plan</h2>", "<summary>step 2</summary>", "training.seed"):
        assert part in page
    assert html.escape(visible(samples[-1]["text"])) in page
    total = json.loads((workplace / "runs" / "001" / "plan.json").read_text(encoding="utf-8"))["total"]
    assert f"<td>{readable_size(total)}</td>" in page
    assert readable_size(total) in shown[0]


def test_every_run_gets_a_folder_of_its_own(command: Command, workplace: Path, small: Flags) -> None:
    for _ in range(2):
        assert command("train", *small, "--training.steps", "2")[0] == 0
    assert sorted(path.name for path in (workplace / "runs").iterdir()) == ["001", "002"]
    status, _, err = command("train", *small, "--training.steps", "2", "--output", "runs/001")
    assert status == 2
    assert "already holds a run" in err


def test_file_under_flags(command: Command, workplace: Path, small: Flags) -> None:
    (workplace / "run.toml").write_text("[training]\nsteps = 3\nseed = 5\n[optimizer]\nrate = 0.5\n")
    status, _, _ = command("train", "--config", "run.toml", *small, "--optimizer.rate", "0.25")
    assert status == 0
    saved = load_toml(workplace / "runs" / "001" / "config.toml")
    assert (saved.training.steps, saved.training.seed, saved.optimizer.rate) == (3, 5, 0.25)


def test_resume_continues_with_the_runs_own_configuration(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "4", "--optimizer.rate", "0.003")[0] == 0
    status, out, _ = command("train", "--resume", "--training.steps", "6")
    assert status == 0
    assert "resumed" in out
    assert "at step 4" in out
    saved = load_toml(workplace / "runs" / "001" / "config.toml")
    assert (saved.optimizer.rate, saved.training.steps) == (0.003, 6)
    assert load_checkpoint(workplace / "runs" / "001").step == 6


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals are sent to a process")
def test_control_c_saves_and_says_how_to_resume(workplace: Path, small: Flags) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cllm_gpu", "train", *small, "--training.steps", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    metrics = workplace / "runs" / "001" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size > 2000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "\nstopping after this step; the same again stops at once, without saving\n"
    assert "resume with: cllm-gpu train --resume --output" in out
    done = load_checkpoint(workplace / "runs" / "001").step
    assert done == [r["step"] for r in read_metrics(metrics) if r["kind"] == "step"][-1]


def test_gradcheck(command: Command) -> None:
    flags = ("--model.layers", "1", "--model.width", "8", "--vocabulary", "13", "--length", "5")
    status, out, _ = command("gradcheck", *flags)
    assert status == 0
    assert "blocks.0.qkv.weight" in out
    assert "passed" in out
    status, out, _ = command("gradcheck", *flags, "--bound", "1e-300")
    assert status == 1
    assert "FAIL" in out


def test_compare(command: Command, workplace: Path, small: Flags) -> None:
    status, out, err = command(
        "compare", *small, "--training.steps", "4", "--optimizers", "sgd", "adamw", "--output", "comparison"
    )
    assert status == 0, err
    assert "sgd" in out
    assert "adamw" in out
    assert json.loads((workplace / "comparison" / "comparison.json").read_text())["baseline"] == "sgd"


EXPERIMENT = """
title = "two kinds of attention"
seeds = [1, 2]
[[variants]]
name = "standard"
[[variants]]
name = "crystalline"
model.attention = "crystalline"
"""


def test_an_experiment_goes_on_where_it_was(command: Command, workplace: Path, small: Flags) -> None:
    (workplace / "kinds.toml").write_text(EXPERIMENT, encoding="utf-8")
    flags = ("compare", "--experiment", "kinds.toml", *small, "--training.steps", "3")
    status, out, err = command(*flags)
    assert status == 0, err
    assert "4/4 crystalline, seed 2: loss" in out
    found = json.loads((workplace / "runs" / "kinds" / "kinds.json").read_text())
    assert [summary["variant"] for summary in found["summaries"]] == ["standard", "crystalline"]
    assert found["runs"][1]["scalars"]["blocks.0.lattice_scalars"] != [[0.0] * 9] * 2
    status, out, _ = command(*flags)
    assert status == 0
    assert out.count("(kept from before)") == 4
    status, out, _ = command(*flags, "--seeds", "2")
    assert status == 0
    assert out.count("(kept from before)") == 2
    assert json.loads((workplace / "runs" / "kinds" / "kinds.json").read_text())["seeds"] == [2]
    for flag, message in ((("--seeds", "2", "2"), "a seed occurs twice in --seeds"), (("--seeds", "-1"), "--seeds")):
        status, _, err = command(*flags, *flag)
        assert status == 2
        assert message in err
    assert command("compare", *small, "--seeds", "1")[2].startswith("cllm-gpu: error: --seeds requires --exp")


def test_lattice(command: Command, workplace: Path, small: Flags) -> None:
    pytest.importorskip("matplotlib")
    flags = ("--model.attention", "crystalline", "--training.steps", "2", "--output", "run")
    assert command("train", *small, *flags)[0] == 0
    status, out, err = command("lattice", "run", "--output", "pictures", "--prompt", "seven squared is", "--head", "0")
    assert status == 0, err
    expected = {f"{name}.{ending}" for name in ("lattice", "scalars", "weights") for ending in ("png", "svg")}
    assert {path.name for path in (workplace / "pictures").iterdir()} == expected
    assert out.count("written: ") == 6
    assert command("lattice", "--vocabulary", "5000", "--output", "other")[0] == 0
    assert {path.name for path in (workplace / "other").iterdir()} == {"lattice.png", "lattice.svg"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vocabulary", "0"), "--vocabulary is 0; it must lie between 1 and 1048576"),
        (("run", "--head", "9"), "--head is 9; the model has heads 0 to 1"),
        (("run", "--prompt", "x"), "--prompt has fewer than two tokens"),
        (("plain",), "the model in plain has no lattice terms"),
    ],
)
def test_what_lattice_refuses(
    command: Command, workplace: Path, small: Flags, flags: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("matplotlib")
    for name, attention in (("run", "crystalline"), ("plain", "standard")):
        if flags[0] == name:
            options = ("--training.steps", "1", "--output", name, "--model.attention", attention)
            assert command("train", *small, *options)[0] == 0
    status, _, err = command("lattice", *flags)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_info(command: Command) -> None:
    status, out, _ = command("info")
    assert status == 0
    for shown in ("numpy:", "backend:", "operations in reference:", "GPU", "GEMM: "):
        assert shown in out


def test_info_says_how_steps_run_on_a_device(command: Command) -> None:
    if find_compiler() is None:
        pytest.skip("not run: the simulator needs a C++ compiler")
    assert "training steps: recorded and replayed by the simulator" in command("info", "--backend", "simulator")[1]
    assert "training steps" not in command("info", "--backend", "numpy")[1]


def test_version_and_usage(command: Command) -> None:
    assert command("--version")[1].startswith("cllm-gpu ")
    status, out, _ = command("--help")
    assert status == 0
    assert "train" in out
    assert command()[0] == 2


def test_importing_loads_no_device_library() -> None:
    code = (
        "import sys, cllm_gpu, cllm_gpu.backend, cllm_gpu.cli.train;"
        "print([m for m in ('cupy', 'nvmath', 'torch', 'matplotlib', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("size", "batch"), [("tiny", 16), ("mini", 8), ("mini", 16), SMALL_MODEL])
def test_planned_memory_is_what_is_measured(workplace: Path, size: str, batch: int) -> None:
    """Within 10%, as said before training."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("this system does not tell a process its anonymous memory")
    flags = ["--data.source", "text.txt", "--model.size", size, "--training.batch", str(batch)]
    flags += ["--training.steps", "2", "--training.evaluation-batches", "1", "--training.sample-tokens", "0"]
    train = [sys.executable, "-m", "cllm_gpu", "train", *flags]
    done = subprocess.run(train, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("memory: planned"))
    planned, measured = (float(part.split()[-2]) for part in line.split(","))
    assert {part.split()[-1] for part in line.split(",")} == {"MB"}
    assert 0.9 <= measured / planned <= 1.1, line


def test_two_runs_at_once_take_different_folders(workplace: Path, small: Flags) -> None:
    train = [sys.executable, "-m", "cllm_gpu", "train", *small, "--training.steps", "3"]
    both = [subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert (process.wait(timeout=120), process.stderr and process.stderr.read()) == (0, "")
        process.communicate()
    for number in ("001", "002"):
        steps = [r for r in read_metrics(workplace / "runs" / number / "metrics.jsonl") if r["kind"] == "step"]
        assert [record["step"] for record in steps] == [1, 2, 3]


def test_a_copied_run_is_resumed_where_it_lies(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    shutil.copytree(workplace / "runs" / "001", workplace / "runs" / "005")
    assert command("train", "--resume", "--training.steps", "3")[0] == 0
    assert load_checkpoint(workplace / "runs" / "005").step == 3
    assert load_checkpoint(workplace / "runs" / "001").step == 2


def test_what_the_bits_depend_on_is_saved(command: Command, workplace: Path, small: Flags) -> None:
    assert command("train", *small, "--training.steps", "2")[0] == 0
    saved = load_toml(workplace / "runs" / "001" / "config.toml")
    assert saved.backend == "numpy"
    assert saved.training.workers is not None
