"""The energy that an NVIDIA card takes, asked of its driver's management library (NVML).

NVML counts a card's energy since the driver was loaded (nvmlDeviceGetTotalEnergyConsumption, mJ, Volta and newer; NVML
API reference). Cards that do not count, and slices of cards, have no counter here; that is no error.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

from cllm_gpu.devices.driver import driver_library, load_library

_SUCCESS = 0
_BUS_ID_BYTES = 32


class EnergyMeter:
    """The counter of one card."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def joules(self) -> float | None:
        """Taken since the driver was loaded; None if the card does not report it."""
        millijoules = ctypes.c_ulonglong(0)
        if self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules)) != _SUCCESS:
            return None
        return millijoules.value / 1e3


def find_meter(device: int = 0) -> EnergyMeter | None:
    """The counter of CUDA's device number `device`; None without a driver or if the card has no counter."""
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
