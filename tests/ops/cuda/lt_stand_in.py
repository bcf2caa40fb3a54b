"""A stand-in for nvmath.bindings.cublasLt: the same functions and numbers, over host memory, computed by NumPy.

It reads descriptors as cuBLASLt does (column-major, by address) and refuses what cublasLt.h says it must not be given.
Every product is exact: computed in float64 and rounded once to the result's dtype.
"""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import ml_dtypes
import numpy as np

from cllm_gpu.ops.cuda.cublaslt import CublasLt
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.reference.gelu import gelu_backward, gelu_forward
from cllm_gpu.utils.profiling import Watch, unwatched

VERSION = 120903
SUCCESS, NOT_SUPPORTED = 0, 15
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
FLOAT32, BFLOAT16 = 0, 14
DTYPES: dict[int, np.dtype[Any]] = {FLOAT32: np.dtype(np.float32), BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
ALGORITHM_DTYPE = np.dtype([("data_", "<u8", (8,))])
RESULT_DTYPE = np.dtype(
    [
        ("algo", ALGORITHM_DTYPE),
        ("workspace_size", "<u8"),
        ("state", "<i4"),
        ("waves_count", "<f4"),
        ("reserved", "<i4", (4,)),
    ]
)

Epilogue = IntEnum(
    "Epilogue",
    {"DEFAULT": 1, "BIAS": 4, "GELU_AUX": 160, "GELU_AUX_BIAS": 164, "DGELU": 192, "DGELU_BGRAD": 208, "BGRADB": 512},
)
ReductionScheme = IntEnum("ReductionScheme", {"NONE": 0, "INPLACE": 1, "COMPUTE_TYPE": 2, "OUTPUT_TYPE": 4})
MatmulDescAttribute = IntEnum(
    "MatmulDescAttribute",
    {"TRANSA": 3, "TRANSB": 4, "EPILOGUE": 7, "BIAS_POINTER": 8, "EPILOGUE_AUX_POINTER": 11, "EPILOGUE_AUX_LD": 12},
)
MatmulPreferenceAttribute = IntEnum(
    "MatmulPreferenceAttribute",
    {
        "MAX_WORKSPACE_BYTES": 1,
        "REDUCTION_SCHEME_MASK": 3,
        "MIN_ALIGNMENT_A_BYTES": 5,
        "MIN_ALIGNMENT_B_BYTES": 6,
        "MIN_ALIGNMENT_C_BYTES": 7,
        "MIN_ALIGNMENT_D_BYTES": 8,
    },
)
DESC_DTYPES = {
    "TRANSA": np.int32, "TRANSB": np.int32, "EPILOGUE": np.uint32, "BIAS_POINTER": np.int64,
    "EPILOGUE_AUX_POINTER": np.int64, "EPILOGUE_AUX_LD": np.int64,
}  # fmt: skip
PREFERENCE_DTYPES = {"MAX_WORKSPACE_BYTES": np.uint64}
"""All others are uint32."""


class LtError(Exception):
    """A status that is not success."""


@dataclass
class Operation:
    compute_type: int
    attributes: dict[MatmulDescAttribute, int] = field(default_factory=dict)

    def get(self, name: str, default: int = 0) -> int:
        return self.attributes.get(MatmulDescAttribute[name], default)

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.get("EPILOGUE", Epilogue.DEFAULT))


@dataclass(frozen=True)
class Layout:
    type: int
    rows: int
    columns: int
    leading: int

    def at(self, address: int) -> np.ndarray[Any, Any]:
        """The matrix (rows, columns) at an address, writable."""
        if self.leading < self.rows:
            raise LtError("the leading dimension is smaller than a column")
        return memory(address, DTYPES[self.type], (self.columns, self.leading))[:, : self.rows].T


def memory(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Host memory at an address, as an array."""
    if address == 0 or address % min(8, dtype.itemsize):
        raise LtError(f"address {address} of {dtype.name}")
    raw = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


class StandIn:
    """The module. `searches` and `products` count calls; `objects` holds every descriptor that was not destroyed."""

    cuBLASLtError = LtError  # noqa: N815 (the binding's name)
    Epilogue, ReductionScheme = Epilogue, ReductionScheme
    MatmulDescAttribute, MatmulPreferenceAttribute = MatmulDescAttribute, MatmulPreferenceAttribute
    matmul_heuristic_result_dtype, matmul_algo_dtype = RESULT_DTYPE, ALGORITHM_DTYPE

    def __init__(self, *, lacks: frozenset[str] = frozenset(), silent: bool = False) -> None:
        self.lacks, self.silent = lacks, silent
        """Epilogues it has no algorithm for; it says so by an error, or by an empty list when `silent`."""
        self.objects: dict[int, Any] = {}
        self.searches = 0
        self.products: list[str] = []
        self._next = 1000

    def _keep(self, thing: Any) -> int:
        self._next += 1
        self.objects[self._next] = thing
        return self._next

    def create(self) -> int:
        return self._keep("handle")

    def get_version(self) -> int:
        return VERSION

    def matmul_desc_create(self, compute_type: int, scale_type: int) -> int:
        if scale_type != FLOAT32 or compute_type not in (COMPUTE_32F, COMPUTE_32F_FAST_TF32):
            raise LtError("scale or compute type")
        return self._keep(Operation(compute_type))

    def matmul_desc_destroy(self, matmul_desc: int) -> None:
        del self.objects[matmul_desc]

    def get_matmul_desc_attribute_dtype(self, attr: int) -> Any:
        return DESC_DTYPES[MatmulDescAttribute(attr).name]

    def matmul_desc_set_attribute(self, matmul_desc: int, attr: int, buf: int, size_in_bytes: int) -> None:
        value = _read(buf, self.get_matmul_desc_attribute_dtype(attr), size_in_bytes)
        self.objects[matmul_desc].attributes[MatmulDescAttribute(attr)] = value

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        return self._keep(Layout(type, rows, cols, ld))

    def matrix_layout_destroy(self, mat_layout: int) -> None:
        del self.objects[mat_layout]

    def matmul_preference_create(self) -> int:
        return self._keep({})

    def matmul_preference_destroy(self, pref: int) -> None:
        del self.objects[pref]

    def get_matmul_preference_attribute_dtype(self, attr: int) -> Any:
        return PREFERENCE_DTYPES.get(MatmulPreferenceAttribute(attr).name, np.uint32)

    def matmul_preference_set_attribute(self, pref: int, attr: int, buf: int, size_in_bytes: int) -> None:
        value = _read(buf, self.get_matmul_preference_attribute_dtype(attr), size_in_bytes)
        self.objects[pref][MatmulPreferenceAttribute(attr).name] = value

    def matmul_algo_get_heuristic(
        self,
        light_handle: int,
        operation_desc: int,
        adesc: int,
        bdesc: int,
        cdesc: int,
        ddesc: int,
        preference: int,
        requested_algo_count: int,
        heuristic_results_array: int,
        return_algo_count: int,
    ) -> None:
        """Three results: one that failed, one that wants more than the workspace it may have, one that works."""
        self.searches += 1
        operation, wanted = self.objects[operation_desc], self.objects[preference]
        layouts = [self.objects[x] for x in (adesc, bdesc, cdesc, ddesc)]
        assert self.objects[light_handle] == "handle"
        assert wanted["REDUCTION_SCHEME_MASK"] & (ReductionScheme.INPLACE | ReductionScheme.OUTPUT_TYPE) == 0
        _check(operation, layouts)
        memory(return_algo_count, np.dtype(np.int32), (1,))[0] = 0
        if operation.epilogue.name in self.lacks:
            if self.silent:
                return
            raise LtError("the requested functionality is not supported (CUBLAS_STATUS_NOT_SUPPORTED)")
        results = memory(heuristic_results_array, RESULT_DTYPE, (requested_algo_count,))
        for result, state, extra in zip(results, (NOT_SUPPORTED, SUCCESS, SUCCESS), (0, 1, 0), strict=False):
            result["state"], result["workspace_size"] = state, wanted["MAX_WORKSPACE_BYTES"] + extra
            good = state == SUCCESS and not extra
            result["algo"]["data_"][:] = 0
            result["algo"]["data_"][0] = _fingerprint(operation, layouts) if good else 0
            sides = ("A", "B", "C", "D")
            result["algo"]["data_"][1:5] = [wanted[f"MIN_ALIGNMENT_{side}_BYTES"] for side in sides]
            result["algo"]["data_"][5:7] = [_lowest_bit(operation.get(n)) for n in _POINTERS]
            result["algo"]["data_"][7] = wanted["MAX_WORKSPACE_BYTES"]
        memory(return_algo_count, np.dtype(np.int32), (1,))[0] = 3

    def matmul(
        self,
        light_handle: int,
        compute_desc: int,
        alpha: int,
        a: int,
        adesc: int,
        b: int,
        bdesc: int,
        beta: int,
        c: int,
        cdesc: int,
        d: int,
        ddesc: int,
        algo: int,
        workspace: int,
        workspace_size_in_bytes: int,
        stream: int,
    ) -> None:
        """D = epilogue(alpha·op(A)·op(B) + beta·C). The algorithm must be one found for just this problem."""
        operation = self.objects[compute_desc]
        layouts = [self.objects[x] for x in (adesc, bdesc, cdesc, ddesc)]
        _check(operation, layouts)
        found = memory(algo, ALGORITHM_DTYPE, (1,))[0]["data_"]
        assert found[0] == _fingerprint(operation, layouts), "an algorithm of another problem"
        for address, alignment in zip((a, b, c, d), found[1:5], strict=True):
            assert address % int(alignment) == 0, "an array is less aligned than the search was told"
        for name, alignment in zip(_POINTERS, found[5:7], strict=True):
            assert not alignment or operation.get(name) % int(alignment) == 0, f"{name} is less aligned"
        assert workspace_size_in_bytes >= found[7]
        memory(workspace, np.dtype(np.uint8), (workspace_size_in_bytes,))[:64] = 0xFF
        first, second = (
            layout.at(address).astype(np.float64) for layout, address in zip(layouts, (a, b), strict=False)
        )
        first = first.T if operation.get("TRANSA") else first
        second = second.T if operation.get("TRANSB") else second
        scales = [memory(x, np.dtype(np.float32), (1,))[0] for x in (alpha, beta)]
        product = scales[0] * (first @ second)
        if scales[1]:
            product += scales[1] * layouts[2].at(c).astype(np.float64)
        result = layouts[3].at(d)
        result[...] = _apply(operation, first, second, product, layouts[3]).astype(result.dtype)
        self.products.append(operation.epilogue.name)


_POINTERS = ("BIAS_POINTER", "EPILOGUE_AUX_POINTER")


def _read(buf: int, dtype: Any, size_in_bytes: int) -> int:
    if size_in_bytes != np.dtype(dtype).itemsize:
        raise LtError("an unsupported value or parameter was passed to the function (CUBLAS_STATUS_INVALID_VALUE)")
    return int(memory(buf, np.dtype(dtype), (1,))[0])


def _lowest_bit(address: int) -> int:
    return min(256, address & -address)


def _fingerprint(operation: Operation, layouts: list[Layout]) -> int:
    fixed = {name: value for name, value in operation.attributes.items() if name.name not in _POINTERS}
    return 1 + zlib.crc32(repr((operation.compute_type, sorted(fixed.items()), layouts)).encode())


def _check(operation: Operation, layouts: list[Layout]) -> None:
    """The rules of cublasLt.h."""
    first, second, into, out = layouts
    kinds = (first.type, second.type, out.type)
    if kinds not in ((FLOAT32,) * 3, (BFLOAT16,) * 3, (BFLOAT16, BFLOAT16, FLOAT32)) or into != out:
        raise LtError(f"types {kinds}")
    if operation.compute_type == COMPUTE_32F_FAST_TF32 and first.type != FLOAT32:
        raise LtError("TF32 is for float32")
    rows, inner = (first.columns, first.rows) if operation.get("TRANSA") else (first.rows, first.columns)
    inner2, columns = (second.columns, second.rows) if operation.get("TRANSB") else (second.rows, second.columns)
    if (rows, columns, inner) != (out.rows, out.columns, inner2):
        raise LtError(f"shapes {layouts}")
    epilogue = operation.epilogue
    if "GELU" in epilogue.name:
        leading = operation.get("EPILOGUE_AUX_LD")
        if leading % 8 or leading < out.rows or not operation.get("EPILOGUE_AUX_POINTER"):
            raise LtError("the auxiliary matrix: its leading dimension must be a multiple of 8")
    if ("BIAS" in epilogue.name or "BGRAD" in epilogue.name) and not operation.get("BIAS_POINTER"):
        raise LtError("no bias pointer")


def _apply(
    operation: Operation, first: Any, second: Any, product: np.ndarray[Any, Any], out: Layout
) -> np.ndarray[Any, Any]:
    """The epilogue on a product in float64; biases and the auxiliary matrix have the result's dtype."""
    name, dtype = operation.epilogue.name, DTYPES[out.type]
    if "BIAS" in name:
        product = product + memory(operation.get("BIAS_POINTER"), dtype, (out.rows,)).astype(np.float64)[:, None]
    if "GELU" in name:
        layout = Layout(out.type, out.rows, out.columns, operation.get("EPILOGUE_AUX_LD"))
        hidden, result = layout.at(operation.get("EPILOGUE_AUX_POINTER")), np.empty_like(product)
        if name.startswith("GELU"):
            hidden[...] = product.astype(dtype)
            gelu_forward(np, product, None, result)
        else:
            gelu_backward(np, product, hidden.astype(np.float64), result, None, accumulate=False)
        product = result
    if "BGRAD" in name:
        sums = second.sum(axis=0) if name == "BGRADB" else product.sum(axis=1)
        memory(operation.get("BIAS_POINTER"), dtype, sums.shape)[...] = sums.astype(dtype)
    return product


class NoKernel:
    """A RawModule for what must not launch a kernel of ours."""

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        raise AssertionError("a kernel was compiled")


def launcher_with(
    stand_in: StandIn, *, gelu: bool = True, kernels: Any = NoKernel, watched: Watch = unwatched
) -> Launcher:
    """A launcher on the host whose products go to the stand-in."""
    lt = CublasLt(stand_in, binding="a stand-in", gelu=gelu, watched=watched)
    return Launcher(np, kernels, lt=lt, watched=watched)
