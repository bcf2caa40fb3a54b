"""The mutation runner damages what it says, and the checker with a plain comparison catches what it should."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from bench.mutation import equivalent_mutants, mutate
from bench.mutation.mutate import Verdict, mutants, run
from cllm_gpu.simulator import RawKernel, Schedule
from cllm_gpu.utils.errors import UserError

# Sums of rows, a tile of 32 columns at a time, copied one tile ahead. The last barrier of the loop keeps the next copy
# from overwriting a tile that is still being read.
SOURCE = r"""
#include "common.cuh"
// a comment: 1 < 2, x + y
extern "C" __global__ void row_sums(const float* x, float* y, int rows, int columns) {
    __shared__ __align__(16) float tile[2][16];
    __shared__ float part[16];
    const int row = blockIdx.x, t = threadIdx.x;
    const int tiles = columns / 16;
    if (t < 4) copy_async_16(&tile[0][4 * t], x + static_cast<i64>(row) * columns + 4 * t, true);
    copy_async_commit();
    float sum = 0.0f;
    for (int k = 0; k < tiles; ++k) {
        const bool more = k + 1 < tiles;
        if (t < 4 && more)
            copy_async_16(&tile[k + 1 & 1][4 * t], x + static_cast<i64>(row) * columns + 16 * (k + 1) + 4 * t, true);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        sum += tile[k & 1][t ^ 1];
        __syncthreads();
    }
    part[t] = sum;
    __syncthreads();
    if (t == 0) {
        float total = 0.0f;
        for (int i = 0; i < 16; ++i) total += part[i];
        y[row] = total;
    }
}
"""
NEXT_TILE = next(line.strip() for line in SOURCE.split("\n") if "&tile[k + 1 & 1]" in line)
EQUIVALENT = {("row_sums.cu", NEXT_TILE, "copy_async_commit();", "+ -> -", 1): "k + 1 and k - 1 have the same parity"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for header in (Path(__file__).parents[3] / "cuda").glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "row_sums.cu").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def _check(folder: Path) -> None:
    kernel = RawKernel((folder / "row_sums.cu").read_text(encoding="utf-8"), "row_sums", (f"-I{folder}",), check=True)
    x = np.random.default_rng(3).integers(1, 9, (3, 64)).astype(np.float32)
    for schedule in (Schedule(), Schedule(5, lazy_copies=False)):
        y = np.zeros(3, np.float32)
        kernel((3,), (16,), (x, y, np.int32(3), np.int32(64)), schedule=schedule)
        np.testing.assert_array_equal(y, x.sum(axis=1))


def test_mutants_leave_comments_and_directives_alone() -> None:
    found = mutants("a.cu", SOURCE)
    assert not [m for m in found if "comment" in m.context or "#" in m.context]
    kinds = {kind: sum(m.kind == kind for m in found) for kind in {m.kind for m in found}}
    assert kinds["barrier removed"] == 3
    assert kinds["wait removed"] == kinds["wait loosened"] == 1
    assert kinds["commit removed"] == 2
    assert kinds["bound moved"] == 5
    for mutant in found:
        damaged = mutant.apply(SOURCE)
        assert damaged != SOURCE
        assert damaged.count("\n") == SOURCE.count("\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("const int end = begin + rows < all ? begin + rows : all;", []),
        ("f(x + at, size - at < 4 ? int(size - at) : 4);", []),
        ("const float m = a > b ? a : b;", []),
        ("const int end = begin < all ? begin : 7;", ["< -> <="]),
        ("for (int i = 0; i < n; ++i) {}", ["< -> <="]),
        ("a[i >= n] = b->c << 2;", [">= -> >"]),
        ("static_cast<int>(x); template <int N> f<3>();", []),
    ],
)
def test_bounds(line: str, expected: list[str]) -> None:
    found = [f"{m.before} -> {m.after}" for m in mutants("a.cu", line) if m.kind == "bound moved"]
    assert found == expected


@pytest.mark.slow
def test_every_mutant_of_a_small_kernel_is_caught(folder: Path) -> None:
    report = run(folder, ["row_sums.cu"], _check, processes=2, seconds_each=60, equivalent=EQUIVALENT)
    assert report.untried == 0
    assert len(report.counted) >= 20
    assert report.share == 1.0, str(report)


def test_a_blind_check_is_told_apart(folder: Path) -> None:
    report = run(folder, ["row_sums.cu"], lambda _: None, limit=5)
    assert report.share == 0.0
    assert len(report.counted) == 5
    assert "survived: row_sums.cu:" in str(report)


def test_a_mutant_that_never_ends_is_stopped(folder: Path) -> None:
    def check(changed: Path) -> None:
        while (changed / "row_sums.cu").read_text(encoding="utf-8") != SOURCE:
            pass

    report = run(folder, ["row_sums.cu"], check, limit=2, seconds_each=0.3, processes=2)
    assert [v.how for v in report.verdicts] == ["timed out", "timed out"]
    assert report.share == 1.0


def test_a_check_may_limit_its_processor_time(folder: Path) -> None:
    """A check that waits is not stopped, one that computes for ever is."""

    def check(changed: Path) -> None:
        mutate.limit_processor_time(0.5)
        sound = (changed / "row_sums.cu").read_text(encoding="utf-8") == SOURCE
        time.sleep(0.0 if sound else 1.5)
        while not sound:
            pass

    report = run(folder, ["row_sums.cu"], check, limit=2, seconds_each=60, processes=2)
    assert [v.how for v in report.verdicts] == ["timed out", "timed out"]
    assert all(1.5 < v.seconds < 30 for v in report.verdicts)


def test_what_is_known_is_not_judged_again(folder: Path) -> None:
    first = run(folder, ["row_sums.cu"], lambda _: None, limit=3)
    seen: list[Verdict] = []
    whole = run(folder, ["row_sums.cu"], lambda _: None, known=first.verdicts, progress=seen.append)
    assert whole.untried == 0
    assert len(seen) == len(whole.verdicts) - 3
    assert not {v.mutant for v in seen} & {v.mutant for v in first.verdicts}


def test_a_failing_check_is_an_error(folder: Path) -> None:
    def check(_: Path) -> None:
        raise ValueError("never content")

    with pytest.raises(UserError, match="never content"):
        run(folder, ["row_sums.cu"], check)


def test_the_list_of_equivalent_mutants_is_not_stale() -> None:
    cuda = Path(__file__).parents[3] / "cuda"
    known = {key[0] for key in equivalent_mutants.EQUIVALENT}
    there = {m.key for file in known for m in mutants(file, (cuda / file).read_text(encoding="utf-8"))}
    assert not set(equivalent_mutants.EQUIVALENT) - there
