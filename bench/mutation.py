"""Damages the project's own kernels in one place at a time and reports the share that their tests catch.

    python bench/mutation.py [FILE …] [--kinds A,B] [--limit N] [--seed N] [--seconds N] [--processes N]

Files are those of cuda/; all of them where none is named. Each mutant is judged by the file's tests in tests/fused, on
the simulator with every memory access checked. Exits with status 1 when less than 95% of the mutants that change
anything are caught.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.equivalent_mutants import EQUIVALENT  # noqa: E402
from cllm_gpu.fused import sources  # noqa: E402
from cllm_gpu.simulator import mutation  # noqa: E402

REQUIRED_SHARE = 0.95
_ROWWISE, _FLAT, _SEQUENCE = ("tests/fused/test_rowwise.py", "tests/fused/test_flat.py", "tests/fused/test_sequence.py")
_ATTENTION = ("tests/fused/test_attention.py",)
TESTS: dict[str, tuple[str, ...]] = {
    "adam.cu": (_FLAT,),
    "attention.cu": _ATTENTION,
    "attention.cuh": _ATTENTION,
    "attention_bfloat16.cuh": (*_ATTENTION, "-k", "bfloat16 or weights"),
    "attention_float32.cuh": (*_ATTENTION, "-k", "float32 or weights"),
    "attention_fused.cu": (*_ATTENTION, "-k", "in-one or counters"),
    "attention_fused.cuh": (*_ATTENTION, "-k", "in-one or counters"),
    "attention_fused_bfloat16.cuh": (*_ATTENTION, "-k", "in-one and bfloat16 or conflicts"),
    "attention_fused_float32.cuh": (*_ATTENTION, "-k", "in-one and float32"),
    "attention_tiles_bfloat16.cuh": (*_ATTENTION, "-k", "bfloat16 or weights"),
    "attention_tiles_float32.cuh": (*_ATTENTION, "-k", "float32 or weights"),
    "column_sum.cu": (_ROWWISE, "tests/fused/test_training.py"),
    "columns.cuh": (_ROWWISE, "-k", "column_sum or layernorm_backward"),
    "common.cuh": (_ROWWISE, *_ATTENTION, "-k", "layernorm_forward or bfloat16"),
    "cross_entropy.cu": (_ROWWISE, "-k", "cross_entropy"),
    "dropout.cu": (_SEQUENCE, "-k", "dropout"),
    "embedding.cu": (_SEQUENCE, "-k", "embedding"),
    "gelu.cu": (_ROWWISE, "-k", "gelu"),
    "layernorm.cu": (_ROWWISE, "-k", "layernorm"),
    "philox.cuh": (_SEQUENCE, "-k", "dropout"),
    "rotary.cu": (_SEQUENCE, "-k", "rotary"),
    "symmetry.cu": (_SEQUENCE, "-k", "symmetry"),
    "storage.cuh": (_ROWWISE, _SEQUENCE),
}
"""Each source and the tests that answer for it."""


class _FirstFailure:
    """A pytest plugin that keeps the first failure's last line."""

    message = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.message:
            self.message = str(report.longrepr).strip().split("\n")[-1]


def check(tests: tuple[str, ...], folder: Path) -> None:
    """Run the tests with the sources in `folder`. Raises AssertionError with the first failure."""
    sources.source_directory = lambda: folder
    sources.load_source.cache_clear()
    sources.kernel_parameters.cache_clear()
    os.environ["CLLM_SIMULATOR_CHECK"] = "1"
    first = _FirstFailure()
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    status = pytest.main([*options, *tests], plugins=[first])
    if status != pytest.ExitCode.OK:
        raise AssertionError(first.message or f"pytest ended with {status!r}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", choices=[[], *TESTS], metavar="FILE")
    parser.add_argument("--kinds", default="", help="such as 'barrier removed,wait removed'; all where none is named")
    parser.add_argument("--limit", type=int, default=None, help="at most so many mutants of each file")
    parser.add_argument("--seed", type=int, default=0, help="draws the mutants where there is a limit")
    parser.add_argument("--seconds", type=float, default=600.0, help="time for each file")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    """Run the files asked for and print their reports."""
    asked = _arguments()
    os.chdir(ROOT)
    np.seterr(all="ignore")
    total = mutation.Report()
    for file in asked.files or TESTS:
        report = mutation.run(
            ROOT / "cuda",
            [file],
            functools.partial(check, TESTS[file]),
            kinds=[kind for kind in asked.kinds.split(",") if kind],
            limit=asked.limit,
            seed=asked.seed,
            seconds=asked.seconds,
            seconds_each=120.0,
            processes=asked.processes,
            equivalent=EQUIVALENT,
        )
        print(f"{file}\n{report}\n", flush=True)
        total.verdicts += report.verdicts
        total.untried += report.untried
    print(f"all files\n{total}")
    return 0 if total.share >= REQUIRED_SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
