"""The roofline of a step: its work is the fact sheet's, and rows, gaps and tables are what is made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.training.gpt2_process import SIZES
from bench.training.roofline import (
    ATTENTION,
    BIASES,
    CLASSES,
    EMBEDDING,
    GELU,
    GELU_BACKWARD,
    LATTICE,
    LOSS,
    NORM,
    NORM_BACKWARD,
    OPTIMIZER,
    PRODUCTS,
    Measured,
    gaps_sentence,
    largest_gaps,
    least_milliseconds,
    profile_rows,
    profile_table,
    step_work,
)

GPT2 = SIZES["124M"].architecture()
BATCH, COPY, GEMM = 64, 4.3, 790.0
"""Those of the fact sheet."""


# ---- the work


def test_the_work_is_the_fact_sheets() -> None:
    """GPT-2 124M at B=64, T=1024: TFLOP, GB and least ms of the sheet, to the last digit that it gives, but for:

    products, 88.7 GB: it lets every weight's gradient be read before it is added to, 2 bytes of each parameter more;
    layer norm backward, 10.1: it lets the last norm read a residual gradient, which there is not: 0.1 less;
    embedding and norm, 1.3: it zeroes gradients and reads them to add, 4 bytes of each parameter: 0.5 less.
    """
    work = step_work(GPT2, BATCH, fused=True)
    parameters = 124_475_904
    beta = 2 * parameters / 1e9
    assert work[PRODUCTS].flop / 1e12 == pytest.approx(48.6, abs=0.05)
    assert work[PRODUCTS].bytes / 1e9 + beta == pytest.approx(88.7, abs=0.05)
    assert work[ATTENTION].flop / 1e12 == pytest.approx(4.3, abs=0.05)
    assert work[ATTENTION].bytes / 1e9 == pytest.approx(14.6, abs=0.05)
    assert work[LOSS].bytes / 1e9 == pytest.approx(13.2, abs=0.05)
    assert work[NORM].bytes / 1e9 == pytest.approx(9.9, abs=0.05)
    assert work[NORM_BACKWARD].bytes / 1e9 + 0.1 == pytest.approx(10.1, abs=0.05)
    assert work[EMBEDDING].bytes / 1e9 + 2 * beta == pytest.approx(1.3, abs=0.05)
    assert work[OPTIMIZER].bytes / 1e9 == pytest.approx(3.5, abs=0.05)
    least = {name: least_milliseconds(part, COPY, GEMM) for name, part in work.items()}
    sheet = {PRODUCTS: 61.5, ATTENTION: 5.5, LOSS: 3.1, NORM: 2.3, NORM_BACKWARD: 2.3, EMBEDDING: 0.2,
             OPTIMIZER: 0.8}  # fmt: skip
    assert least == pytest.approx(sheet, abs=0.05)


def test_the_work_outside_of_products_is_the_fact_sheets() -> None:
    """Bias gradients, 10.9 GB in 48 sums: up's, 4 of 9 parts, is summed with GELU here; and what biases are added to
    is read and written besides."""
    fused, apart = (step_work(GPT2, BATCH, fused=fused) for fused in (True, False))
    assert apart[GELU].bytes / 1e9 == pytest.approx(9.7, abs=0.05)
    assert apart[GELU_BACKWARD].bytes / 1e9 == pytest.approx(14.5, abs=0.05)
    assert apart[BIASES].bytes / 1e9 / 3 == pytest.approx(10.9 * 5 / 9, abs=0.05)
    assert fused[PRODUCTS].bytes - apart[PRODUCTS].bytes == apart[GELU].bytes, "what GELU's gradient is computed from"
    assert {GELU, GELU_BACKWARD, BIASES} == apart.keys() - fused.keys()


def test_the_largest_size_has_more_of_everything() -> None:
    larger = step_work(SIZES["350M"].architecture(), BATCH, fused=False)
    for name, part in step_work(GPT2, BATCH, fused=False).items():
        assert larger[name].bytes > part.bytes or name == LOSS  # of the vocabulary, which is the same
        assert larger[name].flop >= part.flop


def test_counts_are_of_sequences_of_the_whole_context() -> None:
    """Twice the batch is twice the products, the attention and the loss; parameters are read once either way."""
    one, two = (step_work(GPT2, batch, fused=False) for batch in (8, 16))
    for name in (ATTENTION, LOSS, GELU, GELU_BACKWARD, BIASES, NORM, NORM_BACKWARD):
        assert two[name].bytes == 2 * one[name].bytes, name
    assert two[OPTIMIZER] == one[OPTIMIZER]
    assert two[PRODUCTS].flop == 2 * one[PRODUCTS].flop
    assert [name for name in two if two[name].launches != one[name].launches] == []


# ---- rows and what is said of them


def doubled_rows() -> list[dict[str, Any]]:
    """Every class measured at twice its least."""
    work = step_work(GPT2, BATCH, fused=True)
    seen = {name: Measured(part.launches, 2.0 * (least_milliseconds(part, COPY, GEMM) or 0)) for name, part in
            work.items()} | {LATTICE: Measured(3, 500.0)}  # fmt: skip
    return profile_rows(work, seen, COPY, GEMM)


def test_rows_and_the_two_largest_gaps() -> None:
    rows = doubled_rows()
    assert [row["class"] for row in rows] == [name for name in CLASSES if name in {row["class"] for row in rows}]
    by_class = {row["class"]: row for row in rows}
    assert by_class[PRODUCTS]["times_the_least"] == pytest.approx(2.0)
    assert by_class[LATTICE]["least_milliseconds"] is None, "nothing says what it could take at least"
    gaps = largest_gaps(rows)
    assert [gap["class"] for gap in gaps] == [PRODUCTS, ATTENTION]
    assert gaps[0]["milliseconds"] == pytest.approx(61.5, abs=0.05)
    assert gaps_sentence(gaps) == "the largest gaps to the least: matrix products 61.5 ms, attention 5.5 ms"
    line = next(line for line in profile_table(rows).splitlines() if line.startswith(PRODUCTS))
    assert line.split()[2:] == ["147", "147", "48.6", "88.5", "61.51", "123.01", "2.00"]
    json.dumps(rows, allow_nan=False)


def test_without_rates_there_is_no_least_and_no_gap() -> None:
    work = step_work(GPT2, BATCH, fused=True)
    rows = profile_rows(work, {PRODUCTS: Measured(147, 60.0)}, None, GEMM)
    assert [row["least_milliseconds"] for row in rows] == [None] * len(rows)
    assert largest_gaps(rows) == []
    assert gaps_sentence([]) == "no gaps: nothing was timed"
    assert rows[1]["launches"] == 0
