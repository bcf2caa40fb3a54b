"""Energy by NVML, on a stand-in of the driver's two libraries, and what training makes of it."""

from __future__ import annotations

import ctypes
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.cli.progress import ConsoleReporter
from cllm_gpu.devices import energy as power
from cllm_gpu.devices.driver import load_library
from cllm_gpu.devices.energy import EnergyMeter, find_meter, meter_of
from cllm_gpu.devices.peak_flops import Peak
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.training.mean_power import MeanPower, PowerDraw
from cllm_gpu.training.reporter import Outcome
from cllm_gpu.training.step_timer import FIGURES, StepTimer
from tests.bench.fakes import Clock

BUS_ID = b"0000:3B:00.0"


class Driver:
    """As much of the CUDA driver as says where device 1 is plugged in."""

    def __init__(self, **fails: int) -> None:
        self._fails = fails

    def cuInit(self, flags: int) -> int:  # noqa: N802 (the libraries' names)
        return self._fails.get("cuInit", 0)

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 40 + ordinal
        return self._fails.get("cuDeviceGet", 0)

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        assert (size, device.value) == (len(text), 41)
        text.value = BUS_ID
        return self._fails.get("cuDeviceGetPCIBusId", 0)


class Nvml:
    """As much of NVML as counts the energy of the card on BUS_ID, in mJ."""

    def __init__(self, **fails: int) -> None:
        self._fails = fails
        self.millijoules = 1_500_000

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self._fails.get("nvmlInit_v2", 0)

    def nvmlDeviceGetHandleByPciBusId_v2(self, bus_id: Any, handle: Any) -> int:  # noqa: N802
        assert bus_id.value == BUS_ID
        handle._obj.value = 0x7FFF00001234
        return self._fails.get("nvmlDeviceGetHandleByPciBusId_v2", 0)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, energy: Any) -> int:  # noqa: N802
        assert (handle.value, ctypes.sizeof(energy._obj)) == (0x7FFF00001234, 8)
        energy._obj.value = self.millijoules
        return self._fails.get("nvmlDeviceGetTotalEnergyConsumption", 0)


def test_the_counter_of_cudas_device_in_joules() -> None:
    nvml = Nvml()
    meter = meter_of(nvml, Driver(), 1)
    assert meter is not None
    assert meter.joules() == 1500.0
    nvml.millijoules = 5_000_000_000_000  # more than 32 bits
    assert meter.joules() == 5e9


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet", "cuDeviceGetPCIBusId"])
def test_without_a_device_there_is_no_meter(function: str) -> None:
    assert meter_of(Nvml(), Driver(**{function: 100}), 1) is None


@pytest.mark.parametrize(
    "function", ["nvmlInit_v2", "nvmlDeviceGetHandleByPciBusId_v2", "nvmlDeviceGetTotalEnergyConsumption"]
)
def test_a_card_that_does_not_count_has_no_meter(function: str) -> None:
    assert meter_of(Nvml(**{function: 3}), Driver(), 1) is None


def test_a_library_without_the_function_has_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Nvml, "nvmlDeviceGetTotalEnergyConsumption")
    assert meter_of(Nvml(), Driver(), 1) is None


@pytest.mark.parametrize("absent", ["nvml", "driver"])
def test_without_the_libraries_there_is_no_meter(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(power, "load_library", lambda name: None if absent == "nvml" else Nvml())
    monkeypatch.setattr(power, "driver_library", lambda: None if absent == "driver" else Driver())
    assert find_meter(1) is None
    assert load_library("libthere-is-none.so.1") is None


def test_with_both_libraries_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "load_library", lambda name: Nvml())
    monkeypatch.setattr(power, "driver_library", Driver)
    assert find_meter(1) is not None


# ---- over a run


def _meter(nvml: Nvml) -> EnergyMeter:
    found = meter_of(nvml, Driver(), 1)
    assert found is not None
    return found


def test_the_mean_is_over_a_second_of_steps_and_more() -> None:
    nvml, clock = Nvml(), Clock()
    mean = MeanPower(_meter(nvml), clock)

    def step(seconds: float, joules: float) -> PowerDraw | None:
        clock.now += seconds
        nvml.millijoules += round(1e3 * joules)
        return mean.step(100)

    assert step(0.5, 200.0) is None
    assert step(0.75, 300.0) == PowerDraw(500 / 1.25, 500 / 200)
    assert step(0.25, 999.0) == PowerDraw(400.0, 2.5), "the window under way is not told"
    clock.now += 100.0
    nvml.millijoules += 10**9
    mean.restart()  # an evaluation: neither its seconds nor its joules are of a step
    assert step(0.5, 1.0) == PowerDraw(400.0, 2.5)
    assert step(0.5, 1.0) == PowerDraw(2.0, 0.01)


def test_a_counter_that_stops_telling_keeps_the_last_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml, clock = Nvml(), Clock()
    mean = MeanPower(_meter(nvml), clock)
    clock.now, nvml.millijoules = 2.0, nvml.millijoules + 4000
    assert mean.step(1) == PowerDraw(2.0, 4.0)
    nvml._fails["nvmlDeviceGetTotalEnergyConsumption"] = 999
    for _ in range(3):
        clock.now += 2.0
        assert mean.step(1) == PowerDraw(2.0, 4.0)


def test_a_steps_figures() -> None:
    nvml, clock = Nvml(), Clock()
    architecture = Architecture(vocabulary=32, context=8, layers=1, heads=1, kv_heads=1, width=8, mlp_width=32)
    plain = get_backend("numpy")
    card = Backend(
        "card", plain.xp, plain.ops, "a card", peak=lambda: Peak(1e6, "made up"), energy_meter=lambda: _meter(nvml)
    )
    for backend, names in ((plain, FIGURES[:2]), (card, FIGURES)):
        timer = StepTimer(backend, architecture, 4, clock)
        line = timer.begin()
        assert (line is not None) == (backend is card)
        clock.now += 2.0
        nvml.millijoules += 64_000
        figures = timer.step()
        assert tuple(figures) == names
        assert (figures["seconds"], figures["tokens_per_second"]) == (2.0, 16.0)
        clock.now += 7.0
        timer.restart()
        clock.now += 0.5
        assert timer.step()["seconds"] == 0.5
    assert (figures["watts"], figures["joules_per_token"]) == (32.0, 2.0)


def test_a_card_without_a_counter_has_no_power() -> None:
    plain = get_backend("numpy")
    architecture = Architecture(vocabulary=32, context=8, layers=1, heads=1, kv_heads=1, width=8, mlp_width=32)
    clock = Clock()
    timer = StepTimer(Backend("card", plain.xp, plain.ops, "a card", energy_meter=lambda: None), architecture, 4, clock)
    assert timer.begin() is None
    clock.now = 2.0
    assert set(timer.step()) == {"seconds", "tokens_per_second"}


def test_the_end_of_a_run_tells_power_where_there_is_one(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 1.0, "smoothed_loss": 1.0, "rate": 1e-3, "gradient_norm": 1.0}
    for drawn in ({}, {"watts": 600.4, "joules_per_token": 0.00123}):
        console = Console(file=io.StringIO(), width=200, soft_wrap=True, highlight=False)
        display = ConsoleReporter(console, 1, lambda: None)
        with display.running(0):
            display.step(record | {"tokens_per_second": 5e5} | drawn)
        display.outcome(Outcome(1, False, None, 0, None, None), tmp_path)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("500,000 tokens/s  600 W" in text) == bool(drawn)
        assert ("power: 600 W, 0.00123 J/token (median of the steps)" in text) == bool(drawn)
