"""ctypes definitions of the structs in runtime/runtime.hpp and include/kernel_table.hpp."""

from __future__ import annotations

import ctypes


class ParameterEntry(ctypes.Structure):
    """struct Parameter."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("pointee_kind", ctypes.c_char),
        ("size", ctypes.c_int),
        ("pointee_size", ctypes.c_int),
        ("is_const", ctypes.c_int),
    )


class KernelTable(ctypes.Structure):
    """struct Kernel."""

    _fields_ = (
        ("invoke", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ParameterEntry)),
        ("count", ctypes.c_int),
    )


class VariableEntry(ctypes.Structure):
    """struct Variable."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    )


class RangeEntry(ctypes.Structure):
    """struct Range."""

    _fields_ = (
        ("low", ctypes.c_uint64),
        ("high", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("item_bytes", ctypes.c_int),
    )


class TrafficEntry(ctypes.Structure):
    """struct Traffic."""

    _fields_ = (
        ("code", ctypes.c_uint64),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("instructions", ctypes.c_uint64),
        ("passes", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
    )


class LaunchRequest(ctypes.Structure):
    """struct Launch."""

    _fields_ = (
        ("kernel", ctypes.POINTER(KernelTable)),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("static_limit", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("lazy_copies", ctypes.c_int32),
        ("count_traffic", ctypes.c_int32),
        ("stacks", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("ranges", ctypes.POINTER(RangeEntry)),
        ("range_count", ctypes.c_int64),
        ("traffic", ctypes.POINTER(TrafficEntry)),
        ("traffic_capacity", ctypes.c_int64),
        ("traffic_count", ctypes.c_int64),
        ("static_shared", ctypes.c_uint64),
        ("fault_block", ctypes.c_uint * 3),
        ("fault_thread", ctypes.c_uint * 3),
        ("fault_address_in_code", ctypes.c_uint64),
        ("other_address_in_code", ctypes.c_uint64),
        ("fault_line", ctypes.c_int32),
        ("other_line", ctypes.c_int32),
        ("fault_kind", ctypes.c_char * 32),
        ("fault_file", ctypes.c_char * 512),
        ("fault_message", ctypes.c_char * 1024),
    )
