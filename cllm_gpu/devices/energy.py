"""The energy that an NVIDIA card takes, asked of its driver's management library (NVML), and the mean power it makes.

NVML counts a card's energy since the driver was loaded (nvmlDeviceGetTotalEnergyConsumption, mJ, Volta and newer; NVML
API reference). A mean over a window is the difference of two readings over the seconds between them: no sampling, and
nothing to do in between. Cards that do not count, and slices of cards, have no power here; that is no error.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cllm_gpu.devices.driver import driver_library, load_library

WINDOW = 1.0
"""Seconds of a mean at least: the counter itself moves only some times a second."""
_SUCCESS = 0
_BUS_ID_BYTES = 32


class EnergyMeter:
    """The counter of one card."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float | None:
        """Taken since the driver was loaded; None where the card does not say."""
        millijoules = ctypes.c_ulonglong(0)
        if self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)) != _SUCCESS:
            return None
        return millijoules.value / 1e3


def find_meter(device: int = 0) -> EnergyMeter | None:
    """The counter of CUDA's device number `device`; None where there is no driver or the card does not count."""
    nvml = load_library("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    driver = driver_library()
    return None if nvml is None or driver is None else meter_of(nvml, driver, device)


def meter_of(nvml: Any, driver: Any, device: int) -> EnergyMeter | None:
    """`find_meter` with the two libraries.

    NVML numbers all cards of the machine, CUDA those that it was told to show: their PCI bus ids are the same.
    """
    number, bus_id, handle = ctypes.c_int(0), ctypes.create_string_buffer(_BUS_ID_BYTES), ctypes.c_void_p()
    steps: tuple[Callable[[], int], ...] = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(number), device),
        lambda: driver.cuDeviceGetPCIBusId(bus_id, _BUS_ID_BYTES, number),
        lambda: nvml.nvmlInit_v2(),
        lambda: nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id, ctypes.byref(handle)),
    )
    try:
        if any(step() != _SUCCESS for step in steps):
            return None
        meter = EnergyMeter(nvml, handle)
        return None if meter.joules() is None else meter
    except AttributeError:  # a library too old to have the function
        return None


@dataclass(frozen=True)
class Drawn:
    """Of one window."""

    watts: float
    joules_per_token: float


class MeanPower:
    """What a card draws while it trains, in windows of at least WINDOW seconds."""

    def __init__(self, meter: EnergyMeter, clock: Callable[[], float] = time.perf_counter) -> None:
        self._meter, self._clock = meter, clock
        self._last: Drawn | None = None
        self.restart()

    def restart(self) -> None:
        """A window begins now: what was drawn before is not counted."""
        self._begun, self._joules, self._tokens = self._clock(), self._meter.joules(), 0

    def step(self, tokens: int) -> Drawn | None:
        """A step of so many tokens is done: what the last whole window says, None before the first."""
        self._tokens += tokens
        seconds = self._clock() - self._begun
        if seconds >= WINDOW:
            before, spent = self._joules, self._tokens
            self.restart()
            if before is not None and self._joules is not None:
                joules = self._joules - before
                self._last = Drawn(joules / seconds, joules / spent)
        return self._last
