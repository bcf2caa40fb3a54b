"""Signals at random instants of a run: it is saved, the status says which, and once resumed it has the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllm_gpu.training.signals import NAMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals are sent to a process"),
]
STEPS = 400
FLAGS = (
    "--data.source", "text.txt", "--model.size", "tiny", "--model.layers", "1", "--model.width", "16",
    "--model.context", "16", "--training.batch", "4", "--training.evaluate-every", "20",
    "--training.evaluation-batches", "2", "--training.checkpoint-every", "30", "--training.workers", "1",
    "--training.sample-tokens", "0", "--quiet",
)  # fmt: skip


def train(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"CLLM_BACKEND": "numpy", "CLLM_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "cllm_gpu", "train", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, restore_signals=True
    )


def status_of(process: subprocess.Popen[bytes]) -> int:
    """Exit status, once it has ended."""
    process.communicate(timeout=60)
    return process.returncode


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()


def test_every_signal_saves_and_the_run_goes_on_bit_exact(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"The number {i} squared is {i * i}.\n" for i in range(600)))
    steps = ("--training.steps", str(STEPS))
    assert status_of(train(tmp_path, *FLAGS, *steps, "--output", "whole")) == 0
    generator, tried, short = random.Random(13), 0, []
    for name in NAMES:
        run = tmp_path / name
        process = train(tmp_path, *FLAGS, *steps, "--output", name)
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=60)
        tried += 1
        if process.returncode != 128 + getattr(signal, name) or not list(run.glob("checkpoints/step_*")):
            short.append(f"{name}: status {process.returncode}, {error.decode()}")
            continue
        if status_of(train(tmp_path, "--resume", "--output", name)) or weights(run) != weights(tmp_path / "whole"):
            short.append(f"{name}: resumed, not the same")
    print(f"{tried} signals tried, {len(short)} fell short")
    assert not short


def test_control_c_during_imports_is_one_line(tmp_path: Path) -> None:
    generator, tried, short = random.Random(19), 0, []
    hooked = "from cllm_gpu.utils import startup; startup.leave_at_once(); print(flush=True); "
    code = hooked + "import sys; sys.argv[1:] = ['train', '--help']; from cllm_gpu.__main__ import main; main()"
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.25))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        tried += 1
        if (process.returncode, error) not in ((130, b"cllm-gpu: interrupted\n"), (0, b"")):
            short.append((process.returncode, error.decode()))
    print(f"{tried} interrupts tried, {len(short)} fell short")
    assert not short
