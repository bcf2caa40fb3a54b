"""The lattice's symmetry on head dimensions; see `cllm_gpu.reference.symmetry`."""

from __future__ import annotations

from typing import Any

from cllm_gpu.lattice import ELEMENTS
from cllm_gpu.native.arguments import INT32, address, strided
from cllm_gpu.native.library import Library, check_status


def symmetry_forward(library: Library, x: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """As the reference; x (B, T, H, D) contiguous along D, all else contiguous. IndexError for no such element."""
    _apply(library, "x", x, elements, cosine, sine, sign, backward=False)


def symmetry_backward(library: Library, dx: Any, elements: Any, cosine: Any, sine: Any, sign: Any) -> None:
    """As the reference; dx (B, T, H, D) contiguous along D, all else contiguous. IndexError for no such element."""
    _apply(library, "dx", dx, elements, cosine, sine, sign, backward=True)


def _apply(
    library: Library, name: str, x: Any, elements: Any, cosine: Any, sine: Any, sign: Any, *, backward: bool
) -> None:
    kernels, dtype = library.kernels(x), x.dtype
    (b, t, h, d), pairs = x.shape, cosine.shape[-1]
    if 2 * pairs > d:
        raise ValueError(f"cosine has {pairs} pairs, which is more than the {d} dimensions of {name} hold")
    data, strides = strided(name, x, x.shape, dtype)
    status = kernels.symmetry(
        b, t, h, d, pairs, data, *strides,
        address("elements", elements, (b, t), INT32),
        address("cosine", cosine, (ELEMENTS, pairs), dtype),
        address("sine", sine, (ELEMENTS, pairs), dtype),
        address("sign", sign, (ELEMENTS,), dtype),
        backward,
    )  # fmt: skip
    if status:
        check_status(status, "elements", ELEMENTS)
