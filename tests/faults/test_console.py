"""A display that is gone, full or closed from the start: training goes on to its end and saves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/dev/full").exists(), reason="not run: needs /dev/full")]
FLAGS = (
    "--data.source text.txt --model.size tiny --model.layers 1 --model.width 16 --model.context 16 --training.batch 4 "
    "--training.evaluation-batches 2 --training.steps 60 --training.sample-tokens 5 --output run"
)
STREAMS = (
    "| head -1",
    "| true",
    "> /dev/full",
    "2> /dev/full",
    "> /dev/full 2>&1",
    ">&-",
    "2>&-",
    "<&-",
    ">&- 2>&- <&-",
)


def test_training_outlives_its_display(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"The number {i} squared is {i * i}.\n" for i in range(600)))
    environment = os.environ | {"CLLM_BACKEND": "numpy", "CLLM_CACHE_DIR": str(tmp_path / "cache")}
    short = []
    for number, streams in enumerate(STREAMS):
        command = f"{sys.executable} -m cllm_gpu train {FLAGS}{number} {streams}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=environment, capture_output=True, timeout=60
        )
        saved = (tmp_path / f"run{number}" / "checkpoints" / "step_00000060").is_dir()
        if done.returncode or not saved or b"Traceback" in done.stderr:
            short.append(f"{streams}: status {done.returncode}, saved {saved}, {done.stderr.decode()}")
    print(f"{len(STREAMS)} displays tried, {len(short)} fell short")
    assert not short
