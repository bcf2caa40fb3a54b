"""The PyTorch side of the kernel benchmarks: tensors that share memory with our arrays, and functions to compare."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np


class TorchSide:
    """The module torch, with zero-copy conversions."""

    def __init__(self, torch: Any, xp: Any, *, compile_functions: bool) -> None:
        self.torch, self.xp, self.compile_functions = torch, xp, compile_functions
        self.functional = importlib.import_module("torch.nn.functional")
        self._attention = importlib.import_module("torch.nn.attention")

    def give(self, array: Any) -> Any:
        """A tensor that shares the memory of a device array."""
        if array.dtype.name != "bfloat16":
            return self.torch.from_dlpack(array)
        return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)

    def take(self, tensor: Any) -> Any:
        """A device array that shares the memory of a tensor."""
        plain = tensor.detach().contiguous()
        if plain.dtype != self.torch.bfloat16:
            return self.xp.from_dlpack(plain)
        return self.xp.from_dlpack(plain.view(self.torch.int16)).view(ml_dtypes.bfloat16)

    def leaf(self, array: Any) -> Any:
        """A tensor with requires_grad=True that shares the memory of a device array."""
        return self.give(array).requires_grad_()

    def versions(self, function: Callable[..., Any]) -> list[tuple[str, Callable[..., Any]]]:
        """(name of the side, function): eager, and compiled if enabled."""
        sides: list[tuple[str, Callable[..., Any]]] = [("torch eager", function)]
        if self.compile_functions:
            sides.append(("torch compiled", self.torch.compile(function, dynamic=False)))
        return sides

    def attention_backends(self) -> list[tuple[str, Any]]:
        """(name of the side, backend of scaled_dot_product_attention)."""
        kinds = self._attention.SDPBackend
        return [("torch flash", kinds.FLASH_ATTENTION), ("torch cuDNN", kinds.CUDNN_ATTENTION)]

    def attention(self, backend: Any, q: Any, k: Any, v: Any) -> Any:
        """Causal attention of q, k, v (B, H, T, D) with exactly this backend."""
        with self._attention.sdpa_kernel(backend):
            return self.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def release(self) -> None:
        """Return the memory of freed tensors to the GPU."""
        if self.torch.cuda.is_available():
            self.torch.cuda.empty_cache()


def load_torch(xp: Any, *, compile_functions: bool) -> tuple[TorchSide | None, str]:
    """The PyTorch side for arrays of `xp`, or None, and a message on PyTorch."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of a third-party import
            torch = importlib.import_module("torch")
    except ImportError:
        return None, "PyTorch is not installed: our kernels are measured alone"
    if xp is not np and not torch.cuda.is_available():
        return None, f"PyTorch {torch.__version__} sees no card: our kernels are measured alone"
    if compile_functions:  # gradients are computed repeatedly from one forward
        functorch: Any = importlib.import_module("torch._functorch.config")
        functorch.donated_buffer = False
    return TorchSide(torch, xp, compile_functions=compile_functions), f"PyTorch {torch.__version__}"
