"""MFU: FLOP per token, a card's peak from its properties, and where both are shown and kept."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cllm_gpu import backend as backend_module
from cllm_gpu.backend import get_backend
from cllm_gpu.cli.progress import ConsoleReporter
from cllm_gpu.config import Config, ModelConfig, TrainingConfig
from cllm_gpu.data import Dataset
from cllm_gpu.data.tokens import TokenSource
from cllm_gpu.devices.peak_flops import MEASURED_CALLS, RATES, Peak, card_peak, known_peak, measured_peak
from cllm_gpu.model.architecture import SIZES, Architecture, LatticeTerms
from cllm_gpu.model.flops import counted_parameters, flop_per_token
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.ops.precision import Precision
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.mfu import Throughput
from cllm_gpu.training.step_timer import FIGURES
from cllm_gpu.training.trainer import Trainer

WITHIN = 0.01  # data sheets give three digits, and clocks rounded to 15 MHz


def gpt2(**changes: Any) -> Architecture:
    shape = {"vocabulary": 50_304, "kv_heads": 12, "mlp_width": 3072} | SIZES["gpt2"]
    return Architecture(**shape | changes)


@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "gigahertz", "precision", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.83, "bf16", 989.4),
        ("NVIDIA H200", (9, 0), 132, 1.83, "tf32", 494.7),
        ("NVIDIA H200", (9, 0), 132, 1.98, "fp32", 66.9),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, "tf32", 156),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, "fp32", 19.5),
        ("NVIDIA A40", (8, 6), 84, 1.74, "bf16", 149.7),
        ("NVIDIA GeForce RTX 3080", (8, 6), 68, 1.71, "bf16", 59.5),
        ("NVIDIA GeForce RTX 3080", (8, 6), 68, 1.71, "tf32", 29.8),
        ("NVIDIA GeForce RTX 3080", (8, 6), 68, 1.71, "fp32", 29.8),
        ("NVIDIA L40S", (8, 9), 142, 2.52, "bf16", 366),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, "fp32", 82.6),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, 2.407, "bf16", 209.5),
    ],
)
def test_the_peak_of_known_cards_is_the_published_one(
    name: str, capability: tuple[int, int], multiprocessors: int, gigahertz: float, precision: Precision,
    teraflops: float,
) -> None:  # fmt: skip
    peak = known_peak(name, capability, multiprocessors, 1e9 * gigahertz, precision)
    assert peak is not None
    assert abs(peak.flop_per_second / 1e12 - teraflops) <= WITHIN * teraflops
    assert f"{multiprocessors} multiprocessors" in peak.source
    assert f"compute capability {capability[0]}.{capability[1]}" in peak.source


def test_of_an_unknown_card_or_clock_no_peak_is_known() -> None:
    assert known_peak("a card", (7, 77), 100, 1e9, "bf16") is None
    assert known_peak("a card", (9, 0), 100, 0.0, "bf16") is None
    assert all(set(rates) == {"bf16", "tf32", "fp32"} for rates in RATES.values())


class Runtime:
    """As much of cupy.cuda.runtime as is asked."""

    capability = (9, 0)

    def getDeviceProperties(self, device: int) -> dict[str, Any]:  # noqa: N802 (CuPy's name)
        major, minor = self.capability
        return {"name": b"NVIDIA H200", "major": major, "minor": minor, "multiProcessorCount": 132}

    def deviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        return {(13, 2): 1_830_000}[attribute, device]


def test_a_cards_peak_is_read_from_its_properties() -> None:
    found = card_peak(Runtime(), 2, "bf16")
    assert found == known_peak("NVIDIA H200", (9, 0), 132, 1.83e9, "bf16")


def test_an_unknown_cards_peak_is_measured_and_said_to_be() -> None:
    now, calls = [0.0], []

    def multiply(x: Any, weight: Any, out: Any) -> None:
        np.matmul(x, weight.T, out=out)
        calls.append(out.shape)
        now[0] += 9.0 if len(calls) == 1 else 0.5 if len(calls) == 4 else 1.0

    peak = measured_peak(multiply, np, "fp32", lambda: None, size=8, clock=lambda: now[0])
    assert calls == [(8, 8)] * (1 + MEASURED_CALLS)
    assert peak.flop_per_second == 2 * 8**3 / 0.5
    assert "measured in fp32 by a matrix product of 8³" in peak.source


def test_flop_of_gpt2_are_those_of_the_formula_by_hand() -> None:
    """Parameters of GPT-2 124M written out: a block has 12·C² + 13·C, and the final norm 2·C."""
    width, layers = 768, 12
    parameters = 50_304 * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert counted_parameters(gpt2()) == parameters
    assert flop_per_token(gpt2()) == 6 * parameters + 12 * layers * width * 1024


def test_tables_that_are_looked_up_do_not_count() -> None:
    tied = counted_parameters(gpt2())
    assert counted_parameters(gpt2(positions="rope")) == tied
    assert counted_parameters(gpt2(tied_head=False)) == tied
    with_points = gpt2(lattice=LatticeTerms(matches=0, same_token=False, distance=True, learned_points=True))
    assert counted_parameters(with_points) == tied + 12 * 12  # a scalar for each head
    assert Layout(parameter_specs(gpt2()), np.float32).count == tied + 1024 * 768


def test_utilisation_and_its_line() -> None:
    throughput = Throughput(2_000_000_000, Peak(1e15, "as someone says"))
    assert math.isclose(throughput.utilisation(250_000), 0.5)
    expected = "MFU: tokens/s · (6·N + 12·L·H·D·T = 2 GFLOP) over 1000 TFLOP/s, as someone says"
    assert throughput.description == expected


class Listener:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.records: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def tokens(count: int) -> TokenSource:
    values = np.random.default_rng(1).integers(0, 32, count, np.uint16)
    return TokenSource("random", [values], vocabulary=32)


def train(folder: Path, **changes: Any) -> Listener:
    """Two steps of a tiny model on numpy, changed."""
    listener = Listener()
    backend = dataclasses.replace(get_backend("numpy", workers=1), **changes)
    loop = TrainingConfig(steps=2, batch=2, evaluation_batches=1, sample_tokens=0)
    config = Config(model=ModelConfig(layers=1, heads=1, width=8, context=8, attention="standard"), training=loop)
    data = Dataset(tokens(200), tokens(40), None, 32, None)
    trainer = Trainer(config, backend, data, folder=folder, reporter=listener)
    try:
        trainer.initialise()
        trainer.train()
    finally:
        trainer.close()
    return listener


def test_a_device_with_a_peak_adds_mfu_to_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    asked = []

    def peak() -> Peak:
        asked.append(1)
        return Peak(1e12, "made up")

    plain, card = train(tmp_path / "plain"), train(tmp_path / "card", peak=peak)
    assert asked == [1]
    assert plain.messages == []
    assert [line for line in card.messages if line.startswith("MFU: ")] == card.messages != []
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "card")]
    without = [[{k: v for k, v in record.items() if k not in FIGURES} for record in one] for one in lines]
    assert without[0] == without[1]
    assert [list(r) for r in lines[0]] == [[k for k in r if k != "mfu"] for r in lines[1]], "same names, same order"
    assert all("mfu" not in r for r in lines[0])
    architecture = Architecture(vocabulary=32, context=8, layers=1, heads=1, kv_heads=1, width=8, mlp_width=32)
    for record in lines[1][:2]:
        expected = record["tokens_per_second"] * flop_per_token(architecture) / 1e12
        assert math.isclose(record["mfu"], expected, rel_tol=1e-12)


RECORD = {"step": 1, "loss": 1.0, "smoothed_loss": 1.0, "rate": 1e-3, "gradient_norm": 1.0}


@pytest.mark.parametrize("has_peak", [True, False])
def test_progress_and_closing_lines_tell_it_where_there_is_one(has_peak: bool, tmp_path: Path) -> None:
    from cllm_gpu.training.reporter import Outcome

    console = Console(file=io.StringIO(), width=200, soft_wrap=True, highlight=False)
    display = ConsoleReporter(console, 3, lambda: None)
    with display.running(0):
        for step, speed in enumerate((1000.0, 3000.0, 2000.0), start=1):
            mfu = {"mfu": speed / 5000} if has_peak else {}
            display.step(RECORD | {"step": step, "tokens_per_second": speed} | mfu)
    display.outcome(Outcome(3, False, None, 0, None, None), tmp_path)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("3,000 tokens/s  MFU 60%" in text) == has_peak
    assert ("speed: 2,000 tokens/s, MFU 40.0% (median of the steps)" in text) == has_peak
    assert ("MFU" in text) == has_peak


class Cupy:
    """As much of cupy as the peak of its current device takes."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.freed = 0
        runtime = Runtime()
        runtime.capability = capability
        device = type("Device", (), {"id": 2, "synchronize": staticmethod(lambda: None)})
        self.cuda = type("Cuda", (), {"Device": device, "runtime": runtime})
        self.asarray, self.empty = np.asarray, np.empty

    def get_default_memory_pool(self) -> Any:
        return self

    def free_all_blocks(self) -> None:
        self.freed += 1


@pytest.mark.parametrize("capability", [(9, 0), (7, 77)])
def test_the_backends_peak_is_measured_only_where_it_is_not_known(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(backend_module, "measured_peak", functools.partial(measured_peak, size=16))
    cupy = Cupy(capability)
    peak = backend_module._cupy_peak(cupy, get_backend("numpy").ops, "fp32")
    known = capability == (9, 0)
    assert ("132 multiprocessors" in peak.source) == known
    assert ("measured in fp32 by a matrix product of 16³" in peak.source) == (not known)
    assert cupy.freed == (0 if known else 1), "what the measurement took is given back"
    assert peak.flop_per_second > 0
