"""The arithmetic behind a result: operations, bytes, rates, targets, verdicts."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest

from bench.gpu_check import machine
from bench.kernels import counts, report, targets, timing
from bench.kernels.targets import Bar, adam_bars, all_bars, attention_bars, bandwidth_bars, product_bars


def row(kernel: str, side: str, rate: float | None, milliseconds: float | None = 1.0, **size: Any) -> dict[str, Any]:
    return {
        "kernel": kernel, "side": side, "size": size, "milliseconds": milliseconds, "tera_per_second": rate,
        "unit": "TB/s", "note": "",
    }  # fmt: skip


@pytest.mark.parametrize("module", [counts, machine, report, timing], ids=lambda module: module.__name__)
def test_examples(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


def test_attention_operations_count_every_product() -> None:
    """Two products of T·T·D forward, a multiplication and an addition each; five backward; half when causal."""
    b, h, t, d = 2, 3, 128, 64
    products = 2 * b * h * t * t * d
    assert counts.attention_forward_flops(b, h, t, d, causal=False) == 2 * products
    assert counts.attention_backward_flops(b, h, t, d, causal=False) == 5 * products
    assert counts.attention_forward_flops(b, h, t, d, causal=True) == products
    assert counts.attention_backward_flops(b, h, t, d, causal=True) == 2.5 * products


def test_bytes_of_adam() -> None:
    """28 per parameter, with float32 gradients and with bf16 gradients and copy."""
    assert counts.ADAM_FLOAT32 == counts.ADAM_BFLOAT16 == 28


def test_rates() -> None:
    assert math.isclose(counts.tera_per_second(counts.matmul_flops(8192, 8192, 8192), 1.5), 2 * 8.192**3 * 1e9 / 1.5e9)
    assert counts.passes_bytes(1000, 2, 3) == 6000


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (None, "not measured"),
        (9.9, "below"),
        (10.0, "reached"),
        (11.9, "reached"),
        (12.0, "stretch reached"),
        (math.nan, "below"),
    ],
)
def test_verdicts(measured: float | None, verdict: str) -> None:
    assert Bar("x", measured, 10.0, "TFLOP/s", "source", stretch=12.0).verdict == verdict


def test_attention_bars_are_for_one_card_and_find_their_rows() -> None:
    rows = [
        row("attention forward", "ours", 190.0, B=16, T=1024, H=32, D=64),
        row("attention forward", "torch flash", 999.0, B=16, T=1024, H=32, D=64),
        row("attention backward", "ours, fused", 230.0, B=4, T=4096, H=16, D=128),
        row("attention backward", "ours", 100.0, B=4, T=4096, H=16, D=128),
    ]
    found = {bar.what: bar for bar in attention_bars(rows, "NVIDIA H200")}
    assert len(found) == 18  # two head sizes, three lengths: forward, and backward in two ways
    assert found["attention forward D=64 T=1024"].measured == 190.0
    assert found["attention forward D=64 T=1024"].verdict == "reached"
    assert found["attention backward D=128 T=4096"].verdict == "below"
    assert found["attention backward, fused D=128 T=4096"].verdict == "reached"
    assert found["attention backward, fused D=128 T=1024"].verdict == "not measured"
    assert found["attention backward D=64 T=16384"].verdict == "not measured"
    assert attention_bars(rows, "NVIDIA A100-SXM4-80GB") == []


def test_attention_goals_lie_between_69_and_87_percent_of_the_stretch() -> None:
    """What the bars' source says of them."""
    ratios = [g / s for goals, stretches in targets.ATTENTION.values() for g, s in zip(goals, stretches, strict=True)]
    assert round(min(ratios), 2) == 0.69
    assert round(max(ratios), 2) == 0.87


def test_bandwidth_is_a_share_of_the_copy_measured_in_the_same_run() -> None:
    rows = [row("GELU forward", "ours", 3.6, N=10, M=20), row("GELU forward", "torch eager", 4.0, N=10, M=20)]
    found = {bar.what: bar for bar in bandwidth_bars(rows, 4.0)}
    bar = found["GELU forward, ours, N=10 M=20"]
    assert bar.measured == pytest.approx(0.9)
    assert bar.verdict == "reached"
    assert found["cross-entropy"].verdict == "not measured"
    without_copy = bandwidth_bars(rows, None)
    assert all(bar.verdict == "not measured" for bar in without_copy)


def test_adam_is_compared_over_the_same_parameters() -> None:
    rows = [
        row("AdamW", "ours, float32", 4.0, 1.0, model="124M"),
        row("AdamW", "torch fused", 3.0, 1.25, model="124M"),
        row("AdamW", "ours, float32", 4.0, 10.0, model="1.5B"),
        row("AdamW", "torch fused", 3.0, 14.0, model="1.5B"),
        row("AdamW", "ours, bf16 gradient and copy", 4.0, 0.1, model="1.5B"),
    ]
    small, large = adam_bars(rows)
    assert (small.measured, small.verdict) == (1.25, "below")
    assert (large.measured, large.verdict) == (1.4, "reached")
    alone = adam_bars([rows[0]])
    assert [bar.verdict for bar in alone] == ["not measured"]


def test_products_are_held_against_the_fastest_other_way() -> None:
    rows = [
        row("MLP forward", "ours", 600.0, 2.0, N=64),
        row("MLP forward", "ours, separate kernels", 500.0, 2.4, N=64),
        row("MLP forward", "torch compiled", 800.0, 1.5, N=64),
        row("MLP forward", "torch compiled", 9000.0, 0.1, N=8),
        row("linear backward", "ours", 600.0, 2.0, N=64),
        row("linear backward", "ours, separate kernels", 500.0, 2.5, N=64),
    ]
    found = {bar.what: bar for bar in product_bars(rows)}
    assert len(found) == 4
    mlp = found["MLP forward against the fastest other way, N=64"]
    assert (mlp.measured, mlp.verdict) == (0.75, "below")
    linear = found["linear backward against the fastest other way, N=64"]
    assert (linear.measured, linear.verdict) == (1.25, "reached")
    assert found["linear forward against the fastest other way"].verdict == "not measured"


def test_a_run_without_rows_has_every_bar_not_measured() -> None:
    found = all_bars([], {"copy_terabytes": None}, "NVIDIA H200")
    assert len(found) == 18 + 1 + len(targets.PRODUCTS) + len(targets.COPY_FRACTIONS)
    assert {bar.verdict for bar in found} == {"not measured"}
    assert all(bar.source for bar in found)


def test_the_table_says_how_long_every_other_side_takes() -> None:
    """Beside the first of ours: the fused backward and torch's, not the first itself, not another size's."""
    rows = [
        row("attention backward", "ours", 100.0, 2.0, T=1024),
        row("attention backward", "ours, fused", 125.0, 1.6, T=1024),
        row("attention backward", "torch flash", 200.0, 1.0, T=1024),
        row("attention backward", "ours", 100.0, 9.0, T=4096),
    ]
    lines = report.kernel_table(rows).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["-", "0.80", "0.50", "-"]
