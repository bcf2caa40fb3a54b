"""Without a GPU its tests are reported as not run, with the reason; CLLM_REQUIRE_GPU=1 makes that a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import gpu_obstacle

ROOT = Path(__file__).resolve().parents[2]


def _run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_long_sequences.py"]
    kept = {name: value for name, value in os.environ.items() if name != "CLLM_REQUIRE_GPU"}
    return subprocess.run(
        [*command, "-k", "65536"], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120
    )


pytestmark = pytest.mark.skipif(gpu_obstacle() is None, reason="there is a GPU here")


def test_not_run_is_reported_with_the_reason() -> None:
    done = _run()
    assert done.returncode == 0, done.stdout
    assert "4 skipped" in done.stdout
    assert f"not run, needs a GPU: {gpu_obstacle()}" in done.stdout


def test_a_required_gpu_that_is_missing_is_a_failure() -> None:
    done = _run(CLLM_REQUIRE_GPU="1")
    assert done.returncode == 1, done.stdout
    assert "4 failed" in done.stdout or "4 errors" in done.stdout
    assert f"CLLM_REQUIRE_GPU=1, but {gpu_obstacle()}" in done.stdout
