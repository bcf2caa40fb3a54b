"""Matrix products with fused epilogues by cuBLASLt, through nvmath-python's bindings, which only this module uses.

Each distinct product has a cached plan: descriptors and the first algorithm of cuBLASLt's heuristic, chosen once per
`_Problem`, which holds everything the choice depends on. Nothing is timed, so the choice, and with it every bit of the
result, is the same in every run on one machine.

Determinism: with split-K, cuBLASLt may add the parts in place, in the result's dtype. The reduction scheme mask given
to the search allows only COMPUTE_TYPE: parts in float32 in the workspace, added by a separate kernel in a fixed order
(or no split-K, which no mask excludes).

The caller provides the workspace, always of the same size, so its address in a captured CUDA graph stays valid.
Source: cublasLt.h of cuBLAS 12.9, the comments on cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t and
cublasLtMatmulPreferenceAttributes_t.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from cllm_gpu.ops.cuda.checks import address_of
from cllm_gpu.ops.cuda.column_major import CUDA_TYPES, Matrix, column_major
from cllm_gpu.ops.cuda.epilogue import NONE, Epilogue
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.profiling import MATMUL, Watch, unwatched

WORKSPACE_BYTES = 32 << 20
"""Workspace size that cuBLAS recommends for Hopper (its manual, cublasSetWorkspace)."""
GELU_GENERATIONS = (9, 10)
"""Major compute capabilities on which the GELU epilogue is used. On 8.x and 12.x it has been measured to be slower than
a separate kernel (karpathy/llm.c#338, #591; sgl-project/sglang#34350)."""
_ALIGNMENT = 128
"""Bytes; planned arrays start at multiples of it, and no algorithm needs more."""
_HIDDEN_MULTIPLE = 8
_CANDIDATES = 4
_SUCCESS = 0
_SCALE_TYPE = CUDA_TYPES["float32"]


@dataclass(frozen=True)
class _Problem:
    """Everything the choice of an algorithm depends on; whether the product accumulates is not part of it.

    Readable form for `CublasLt.refused`; plans are keyed by a tuple of the same values, which is faster to build.
    """

    first: Matrix
    second: Matrix
    kind: str
    out_kind: str
    compute: int
    epilogue: str
    alignments: tuple[int, ...]
    """Alignments of first, second, out, vector and hidden: the largest power of two up to 128; 0 if the array is None.
    """


@dataclass(frozen=True)
class _Plan:
    """Descriptors and the algorithm for one problem; `algorithm` is the address of 64 bytes owned by `memory`."""

    operation: int
    layouts: tuple[int, int, int]
    algorithm: int
    memory: Any


class CublasLt:
    """Matrix products on the GPU that is current at construction.

    library: nvmath.bindings.cublasLt. binding: its name and version. gelu: use GELU epilogues, for bfloat16 only
    (their tanh is approximate). watched: as `Launcher.watched`.
    """

    def __init__(self, library: Any, *, binding: str, gelu: bool, watched: Watch = unwatched) -> None:
        self._library, self._binding, self._gelu, self._watched = library, binding, gelu, watched
        self._handle = library.create()  # lives as long as the process: at its end CUDA may be gone before we are
        self._plans: dict[tuple[Any, ...], _Plan | None] = {}
        self._pointer = np.zeros(1, library.get_matmul_desc_attribute_dtype(library.MatmulDescAttribute.BIAS_POINTER))
        self._pointer_buffer = self._pointer.ctypes.data, self._pointer.nbytes
        self._numbers = np.array([0.0, 1.0], np.float32)
        self._scales = [self._numbers[i:].ctypes.data for i in range(2)]  # addresses of 0 and 1 for alpha and beta
        self.refused: dict[str, str] = {}
        """Products for which cuBLASLt has no algorithm, with the reason."""

    @property
    def description(self) -> str:
        """Versions of the library and its binding."""
        version = self._library.get_version()
        number = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
        return f"cuBLASLt {number} by {self._binding}"

    def takes(self, a: Any, out: Any, epilogue: Epilogue) -> bool:
        """Whether cuBLASLt, and our own restrictions, allow this epilogue for this product."""
        vector, hidden = epilogue.vector, epilogue.hidden
        if any(x is not None and (x.dtype != out.dtype or not x.flags.c_contiguous) for x in (vector, hidden)):
            return False
        if epilogue.kind in ("gelu", "gelu gradient"):
            return self._gelu and out.dtype.name == "bfloat16" and out.shape[1] % _HIDDEN_MULTIPLE == 0
        return epilogue.kind != "bias gradient" or a.shape[1] > 1  # a sum of one term: not before cuBLAS 12.3.4

    def matmul(
        self,
        a: Any,
        b: Any,
        out: Any,
        *,
        compute: int,
        workspace: Any,
        stream: int,
        accumulate: bool = False,
        epilogue: Epilogue = NONE,
    ) -> bool:
        """out (M, N) = a (M, K) · b (K, N), added to `out` if `accumulate`, then the epilogue.

        Returns False, without effect, if the product is refused. Operands must be checked as in
        `cllm_gpu.ops.cuda.gemm.matmul` and not empty. compute: a cublasComputeType_t. workspace: WORKSPACE_BYTES on the
        device. stream: a cudaStream_t. `accumulate` allows only the epilogue "bias gradient", which is a function of
        `a`, not of the result; ValueError for others.
        """
        if accumulate and epilogue.kind not in ("none", "bias gradient"):
            raise ValueError(f"a product with the epilogue {epilogue.kind} does not accumulate")
        if not self.takes(a, out, epilogue):
            return False
        arrays = (b, a, out, epilogue.vector, epilogue.hidden)
        addresses = [0 if x is None else address_of(x) for x in arrays]
        alignments = tuple([_alignment(address) for address in addresses])
        turned = b.flags.c_contiguous, a.flags.c_contiguous
        key = (epilogue.kind, b.shape, a.shape, turned, a.dtype, out.dtype, compute, alignments)
        if key not in self._plans:
            problem = _Problem(
                column_major(b), column_major(a), a.dtype.name, out.dtype.name, compute, _epilogue_name(epilogue),
                alignments,
            )  # fmt: skip
            self._plans[key] = self._plan(problem)
        plan = self._plans[key]
        if plan is None:
            return False
        self._set_pointers(plan.operation, *addresses[3:])
        first, second, result = plan.layouts
        target = addresses[2]
        with self._watched(MATMUL):
            self._library.matmul(
                self._handle, plan.operation, self._scales[1], addresses[0], first, addresses[1], second,
                self._scales[accumulate], target, result, target, result, plan.algorithm,
                address_of(workspace), workspace.nbytes, stream,
            )  # fmt: skip
        return True

    def _set_pointers(self, operation: int, vector: int, hidden: int) -> None:
        """Set the addresses that the epilogue uses; 0 for none."""
        attributes = self._library.MatmulDescAttribute
        for attribute, address in ((attributes.BIAS_POINTER, vector), (attributes.EPILOGUE_AUX_POINTER, hidden)):
            if address:
                self._pointer[0] = address
                self._library.matmul_desc_set_attribute(operation, attribute, *self._pointer_buffer)

    def _plan(self, problem: _Problem) -> _Plan | None:
        """Descriptors and algorithm; None, with the reason in `refused`, if cuBLASLt has no algorithm."""
        library = self._library
        operation = self._operation(problem)
        # the search only looks at the pointers' alignment, so the alignments themselves serve as addresses
        self._set_pointers(operation, *problem.alignments[3:])
        first, second = problem.first, problem.second
        rows = first.columns if first.transposed else first.rows
        columns = second.rows if second.transposed else second.columns
        kind, out_kind = CUDA_TYPES[problem.kind], CUDA_TYPES[problem.out_kind]
        layouts = (
            library.matrix_layout_create(kind, first.rows, first.columns, first.leading),
            library.matrix_layout_create(kind, second.rows, second.columns, second.leading),
            library.matrix_layout_create(out_kind, rows, columns, rows),
        )
        preference = self._preference(problem)
        try:
            algorithm = self._search(operation, layouts, preference)
        except library.cuBLASLtError as error:
            reason = str(error)
        else:
            if algorithm is not None:
                return _Plan(operation, layouts, algorithm.ctypes.data, algorithm)
            reason = "the heuristic found no algorithm"
        finally:
            library.matmul_preference_destroy(preference)
        self.refused[str(problem)] = reason
        for layout in layouts:
            library.matrix_layout_destroy(layout)
        library.matmul_desc_destroy(operation)
        return None

    def _operation(self, problem: _Problem) -> int:
        """The descriptor of the product, without the pointers of a call; alpha and beta are host pointers."""
        library, attributes = self._library, self._library.MatmulDescAttribute
        operation: int = library.matmul_desc_create(problem.compute, _SCALE_TYPE)
        values = {
            attributes.TRANSA: int(problem.first.transposed),
            attributes.TRANSB: int(problem.second.transposed),
            attributes.EPILOGUE: int(getattr(library.Epilogue, problem.epilogue)),
        }
        if "GELU" in problem.epilogue:  # `hidden` has the layout of the result
            first = problem.first
            values[attributes.EPILOGUE_AUX_LD] = first.columns if first.transposed else first.rows
        for attribute, value in values.items():
            held = np.array([value], library.get_matmul_desc_attribute_dtype(attribute))
            library.matmul_desc_set_attribute(operation, attribute, held.ctypes.data, held.nbytes)
        return operation

    def _preference(self, problem: _Problem) -> int:
        """Constraints of the search: workspace size, alignments, and sums in a fixed order."""
        library, attributes = self._library, self._library.MatmulPreferenceAttribute
        preference: int = library.matmul_preference_create()
        first, second, result, *_ = problem.alignments
        for attribute, value in (
            (attributes.MAX_WORKSPACE_BYTES, WORKSPACE_BYTES),
            (attributes.REDUCTION_SCHEME_MASK, int(library.ReductionScheme.COMPUTE_TYPE)),
            (attributes.MIN_ALIGNMENT_A_BYTES, first),
            (attributes.MIN_ALIGNMENT_B_BYTES, second),
            (attributes.MIN_ALIGNMENT_C_BYTES, result),
            (attributes.MIN_ALIGNMENT_D_BYTES, result),
        ):
            held = np.array([value], library.get_matmul_preference_attribute_dtype(attribute))
            library.matmul_preference_set_attribute(preference, attribute, held.ctypes.data, held.nbytes)
        return preference

    def _search(self, operation: int, layouts: tuple[int, int, int], preference: int) -> Any | None:
        """The heuristic's first algorithm that works, as an array of one matmul_algo_dtype; None if none works."""
        results = np.zeros(_CANDIDATES, self._library.matmul_heuristic_result_dtype)
        count = np.zeros(1, np.int32)
        first, second, result = layouts
        self._library.matmul_algo_get_heuristic(
            self._handle, operation, first, second, result, result, preference, _CANDIDATES, results.ctypes.data,
            count.ctypes.data,
        )  # fmt: skip
        for found in results[: int(count[0])]:
            if found["state"] == _SUCCESS and found["workspace_size"] <= WORKSPACE_BYTES:
                return np.array([found["algo"]], self._library.matmul_algo_dtype)
        return None


def _epilogue_name(epilogue: Epilogue) -> str:
    """The name in cublasLtEpilogue_t. The library's columns are our rows: its bias along rows is along our columns."""
    has_vector = epilogue.vector is not None
    return {
        "none": "DEFAULT",
        "bias": "BIAS",
        "gelu": "GELU_AUX_BIAS" if has_vector else "GELU_AUX",
        "gelu gradient": "DGELU_BGRAD" if has_vector else "DGELU",
        "bias gradient": "BGRADB",  # of the library's second operand, our a, summed over K
    }[epilogue.kind]


def _alignment(address: int) -> int:
    """The largest power of two up to 128 that divides an address; 0 for address 0."""
    lowest = (address | _ALIGNMENT) & -(address | _ALIGNMENT)
    return lowest if address else 0


def load_cublaslt(generation: int, watched: Watch = unwatched) -> CublasLt:
    """cuBLASLt on the current GPU, of major compute capability `generation`. Raises UserError if it is not available.

    watched: as `Launcher.watched`.
    """
    if importlib.util.find_spec("nvmath") is None:
        raise UserError("nvmath-python is not installed; it comes with the extras cuda12 and cuda13")
    try:
        library = importlib.import_module("nvmath.bindings.cublasLt")
        binding = f"nvmath-python {importlib.metadata.version('nvmath-python')}"
        return CublasLt(library, binding=binding, gelu=generation in GELU_GENERATIONS, watched=watched)
    except Exception as error:  # a broken install, a missing library and an old driver raise different exceptions
        lines = str(error).splitlines()
        raise UserError(f"nvmath-python does not start: {type(error).__name__}: {lines[0] if lines else ''}") from error
