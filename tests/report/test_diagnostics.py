"""From looks to a table and a picture: parameters gathered by layer, and what is refused."""

from __future__ import annotations

import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cllm_gpu.config import Config, OptimizerConfig
from cllm_gpu.report.diagnostics import (
    ACTIVATIONS,
    DiagnosedRun,
    diagnostics_tables,
    gradient_norm,
    highest,
    layer_of,
    layers,
    plot_diagnostics,
    read_diagnosed,
    series,
    update_ratio,
    zero_share,
)
from cllm_gpu.report.runs import RunRecord
from cllm_gpu.training.diagnostics import DIAGNOSTICS
from cllm_gpu.training.metrics import MetricsLog, clipped
from cllm_gpu.utils.errors import UserError

NAMES = (
    "token_embedding",
    "blocks.1.qkv.weight",
    "blocks.0.qkv.weight",
    "blocks.0.qkv.bias",
    "final_norm.weight",
    "head",
)


def values(gradient: float, weight: float, update: float, zeros: int = 0, subnormals: int = 0) -> dict[str, Any]:
    return {
        "size": 10, "gradient": gradient, "weight": weight, "update": update, "zeros": zeros, "subnormals": subnormals,
    }  # fmt: skip


def look(step: int, **changes: Any) -> dict[str, Any]:
    parameters = {name: values(1.0, 2.0, 0.5) for name in NAMES}
    parameters["blocks.0.qkv.weight"] = values(3.0, 4.0, 0.3, zeros=2, subnormals=1)
    parameters["blocks.0.qkv.bias"] = values(4.0, 0.0, 0.4)
    activations = {kind: [1.0 + step, 2.0] for kinds in ACTIVATIONS.values() for kind in kinds} | {
        "final_residual": [7.0],
        "logits": [9.0],
    }
    return {"step": step, "skipped": None, "parameters": parameters, "activations": activations | changes}


def steps(*norms: float) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"kind": "step", "step": number, "gradient_norm": norm, "skipped": None if math.isfinite(norm) else "why"}
        for number, norm in enumerate(norms, start=1)
    )


@pytest.fixture
def run() -> DiagnosedRun:
    record = RunRecord("r", steps(0.5, 2.0, math.nan, 1.5, 1.0), (), config=Config(optimizer=OptimizerConfig()))
    return DiagnosedRun(record, (look(1), look(5)))


def test_layers_in_the_order_of_the_forward() -> None:
    assert layers(look(1)) == ["embeddings", "block 0", "block 1", "final norm"]
    assert [layer_of(name) for name in ("position_embedding", "lattice_points", "head", "blocks.11.mlp_up.bias")] == [
        "embeddings", "embeddings", "final norm", "block 11",
    ]  # fmt: skip


def test_norms_of_a_layer_are_of_all_its_parameters() -> None:
    found = look(1)
    assert gradient_norm(found, "block 0") == pytest.approx(5.0, rel=1e-15)
    assert update_ratio(found, "block 0") == pytest.approx(0.5 / 4.0, rel=1e-15)
    assert zero_share(found, "block 0") == 3 / 20
    found["parameters"]["blocks.0.qkv.bias"]["gradient"] = math.inf
    assert math.isnan(gradient_norm(found, "block 0"))
    assert gradient_norm(found, "block 1") == 1.0


def test_activations_by_layer(run: DiagnosedRun) -> None:
    found = series(run)["largest"]
    assert list(found) == list(ACTIVATIONS)
    assert found["q, k, v"] == {"block 0": [2.0, 6.0], "block 1": [2.0, 2.0]}
    assert found["residual stream"] == {"block 0": [2.0, 6.0], "block 1": [2.0, 2.0], "final norm": [7.0, 7.0]}
    assert found["logits"] == {"final norm": [9.0, 9.0]}


def test_a_nan_is_shown_where_it_is_and_does_not_hide_the_largest() -> None:
    broken = look(2, attention_residual=[math.nan, 2.0])
    found = series(DiagnosedRun(RunRecord("r", steps(1.0), ()), (look(1), broken)))["largest"]["residual stream"]
    assert math.isnan(found["block 0"][1])
    assert highest(found["block 0"]) == 2.0
    assert math.isnan(highest([math.nan]))


def test_a_model_of_other_layers_has_other_activations(tmp_path: Path) -> None:
    """Such as an MLP without `hidden`: its cells are empty, and it is not in the picture."""
    found = look(1)
    del found["activations"]["hidden"]
    other = DiagnosedRun(RunRecord("r", steps(1.0), ()), (found,))
    assert series(other)["largest"]["MLP"] == {}
    assert ("block 0", "2", "2", "2", "2", "–", "–") in diagnostics_tables(other)[1].rows
    if find_spec("matplotlib"):
        plot_diagnostics([("r", series(other))], tmp_path / "picture.svg")


def test_the_table(run: DiagnosedRun) -> None:
    gradients, activations = diagnostics_tables(run)
    assert (gradients.title, activations.title) == ("r: gradients by layer", "r: largest activations by layer")
    for name, cells in (
        ("embeddings", ("1", "2.50e-01", "0.00%")), ("block 0", ("5", "1.25e-01", "15.00%")),
    ):  # fmt: skip
        assert (name, *cells) in gradients.rows
    assert ("embeddings", "–", "–", "–", "–", "–", "–") in activations.rows
    assert ("block 0", "6", "6", "6", "6", "6", "–") in activations.rows
    assert ("final norm", "7", "–", "–", "–", "–", "9") in activations.rows
    assert gradients.notes[0].startswith("2 looks at 5 steps, 2 clipped, 1 skipped.")
    for table in (gradients, activations):
        console = Console(file=io.StringIO(), width=80)
        console.print(table.rich(80))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert table.title in shown
        assert all(cell in shown for row in table.rows for cell in row)
        assert "…" not in shown
        assert "Too narrow" not in shown


@pytest.mark.parametrize(
    ("norm", "bound", "skipped", "expected"),
    [(2.0, 1.0, None, True), (1.0, 1.0, None, False), (2.0, 0.0, None, False), (2.0, 1.0, "why", False),
     (math.nan, 1.0, "why", False)],
)  # fmt: skip
def test_what_counts_as_clipped(norm: float, bound: float, skipped: str | None, expected: bool) -> None:
    assert clipped({"gradient_norm": norm, "skipped": skipped}, bound) is expected


def test_a_run_without_looks_is_refused(tmp_path: Path) -> None:
    MetricsLog(tmp_path / "metrics.jsonl").append({"kind": "step", "step": 1})
    with pytest.raises(
        UserError, match=r"has no diagnostics; train with, for example, --training\.diagnose-every 50"
    ) as caught:
        read_diagnosed([tmp_path])
    assert str(tmp_path) in str(caught.value)
    MetricsLog(tmp_path / DIAGNOSTICS).append(look(1))
    (found,) = read_diagnosed([tmp_path])
    assert found.looks == (look(1),)
    assert found.clipped is None  # nobody knows the bound: there is no configuration


def test_the_picture_has_a_line_for_every_layer_and_kind(run: DiagnosedRun, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_diagnostics([("one run", series(run)), ("another", series(run))], tmp_path / "layers.svg")
    drawn = (tmp_path / "layers.svg").read_text(encoding="utf-8")
    for text in ("one run", "another", *layers(look(1)), *ACTIVATIONS):
        assert f"<!-- {text} -->" in drawn
