"""Grid of the column-wise kernels (cuda/columns.cuh), and the final reduction of column sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cllm_gpu.ops.cuda.checks import blocks_for, is_wide
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant

MAXIMUM_CHUNKS = 128
LEAST_CHUNK_ROWS = 64
THREADS = 256


@dataclass(frozen=True)
class ColumnGrid:
    """Tiling of a (rows, columns) array: tiles of 32 packs of columns, chunks of rows. Fixed by the shape."""

    grid: tuple[int, int]
    chunk_rows: int
    wide: bool

    @property
    def chunks(self) -> int:
        """Partial sums per column."""
        return self.grid[1]


def column_grid(rows: int, columns: int, *arrays: Any) -> ColumnGrid:
    """The grid over `arrays`, with 16-byte accesses if all of them allow it; None is ignored."""
    wide = is_wide(columns, *arrays)
    width = 16 // arrays[0].dtype.itemsize if wide else 1
    chunk_rows = max(LEAST_CHUNK_ROWS, blocks_for(rows, MAXIMUM_CHUNKS))
    return ColumnGrid((blocks_for(columns, 32 * width), blocks_for(rows, chunk_rows)), chunk_rows, wide)


def finish_column_sum(launcher: Launcher, storage: str, partials: Any, out: Any, *, accumulate: bool) -> None:
    """out (M) = Σ_chunks partials (chunks, M) float32, added to `out` if `accumulate`."""
    chunks, columns = partials.shape
    launcher.launch(
        Variant("column_sum.cu", storage, out.dtype.name),
        "column_sum_finish",
        (blocks_for(columns, 32),),
        THREADS,
        {"partials": partials, "out": out, "chunks": chunks, "columns": columns, "accumulate": int(accumulate)},
    )


def column_sum(launcher: Launcher, x: Any, out: Any, *, accumulate: bool) -> None:
    """out (M) = Σ_rows x (N, M), added to `out` if `accumulate`."""
    rows, columns = x.shape
    storage = x.dtype.name
    cut = column_grid(rows, columns, x)
    partials = launcher.scratch("column_sum", (cut.chunks, columns), "float32")
    launcher.launch(
        Variant("column_sum.cu", storage, out.dtype.name),
        "column_sum_partial",
        cut.grid,
        THREADS,
        {
            "x": x,
            "partials": partials,
            "rows": rows,
            "columns": columns,
            "chunk_rows": cut.chunk_rows,
            "wide": int(cut.wide),
        },
    )
    finish_column_sum(launcher, storage, partials, out, accumulate=accumulate)
