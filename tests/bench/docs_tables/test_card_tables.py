"""The tables of training on a card: of the newest result, and one sentence where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.docs_tables import card_tables
from bench.training import gpt2_process, gpt2_training, step_profile
from bench.training.gpt2_process import SIZES, empty_row
from bench.training.roofline import Measured, largest_gaps, profile_rows, step_work
from tests.bench.fakes import MACHINE

ABOUT = MACHINE | {"driver": "570", "cupy": "14.2.0", "commit": "abc", "beside": "PyTorch 9"}


def _written(folder: Path, about: dict[str, Any], speed: float, profile: dict[str, Any] | None) -> None:
    """By the function that writes a result after a measurement."""
    options = gpt2_training.parse(["--sizes", "10M", "--output", str(folder)])
    measured = {"tokens_per_second": speed, "held_bytes": 2_500_000_000, "watts": 650.4, "joules_per_token": 0.00125}
    rows = [empty_row("ours", "10M", 4) | measured, empty_row("PyTorch", "10M", 4, gpt2_process.OUT_OF_MEMORY)]
    gpt2_training.add_utilisation(rows)
    gpt2_training.write(options, about, rows, profile)


def test_without_a_result_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(card_tables, "RESULTS", tmp_path)
    assert card_tables.training() == card_tables.NOT_MEASURED


def test_the_newest_result_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(card_tables, "RESULTS", tmp_path)
    work = step_work(SIZES["124M"].architecture(), 64, fused=True)
    rows = profile_rows(work, {"attention": Measured(48, 20.0)}, 4.0, 700.0)
    profile = step_profile.empty_profile("124M", 64) | {"rows": rows, "gaps": largest_gaps(rows)}
    older = ABOUT | {"card": "NVIDIA Z", "date": "2030-01-01T00:00:00+00:00"}
    _written(tmp_path, older, 1000.0, None)
    assert "NVIDIA Z" in card_tables.training()
    _written(tmp_path, ABOUT, 2345.0, profile)
    assert len(list(tmp_path.iterdir())) == 2
    lines = card_tables.training().splitlines()
    assert lines[2] == "| 10M | 4 | ours | 2,345 | – | 2.5 GB | 650 | 0.00125 |  |"
    assert lines[3] == "| 10M | 4 | PyTorch | – | – | – | – | – | out of memory |"
    assert any(line.startswith("| 10M against PyTorch | – | 2 times as fast | not measured |") for line in lines)
    (attention,) = [line for line in lines if line.startswith("| attention |")]
    assert attention == f"| attention | 48 | 4.33 | 14.6 | {4329.327 / 700:.2f} | 20.00 | {20 * 700 / 4329.327:.2f} |"
    assert "The largest gaps to the least: attention 13.8 ms." in lines
    assert lines[-1] == ("NVIDIA H200 (not real), driver 570, CuPy 14.2.0, PyTorch 9; commit abc, 2031-02-03.")


def test_the_result_that_is_kept_is_told() -> None:
    """Or that there is none, which is no failure."""
    found = card_tables.newest_result()
    assert (card_tables.NOT_MEASURED if found is None else found["machine"]["card"]) in card_tables.training()
