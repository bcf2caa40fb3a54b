"""One compilation of a CUDA source, and the dtypes of what its kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cllm_gpu.utils.errors import UserError

SCALARS: dict[str, Any] = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
}
_POINTED: dict[str, str] = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "long long": "int64",
    "unsigned": "uint32",
}
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name) for name in ("float32", "float64", "int32", "int64", "uint32")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Variant:
    """One compilation of one source: the dtype of `real`, the dtype of `gradient`, and further defines."""

    source: str
    storage: str
    gradient: str = ""
    """dtype of parameter gradients: like `storage` (also when empty), or float32."""
    defines: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.gradient not in ("", self.storage, "float32"):
            raise UserError(
                f"{self.source}: gradients of dtype {self.gradient} beside arrays of dtype {self.storage}; "
                f"they must be {' or '.join(dict.fromkeys((self.storage, 'float32')))}"
            )
        if self.gradient == self.storage:
            object.__setattr__(self, "gradient", "")  # one variant, one name

    @property
    def options(self) -> tuple[str, ...]:
        """Compiler options that make this variant of the source."""
        flags = [f"-D{name}={value}" for name, value in self.defines]
        if self.storage == "bfloat16":
            flags.append("-DCLLM_BF16=1")
        if self.gradient == "float32":
            flags.append("-DCLLM_GRADIENT_FLOAT=1")
        return ("-std=c++17", *flags)

    def dtype_of(self, type_name: str) -> str:
        """dtype name behind a pointer to `type_name`."""
        if type_name == "real":
            return self.storage
        if type_name == "gradient":
            return self.gradient or self.storage
        if type_name == "table":
            return self.storage if ("CLLM_REAL_TABLE", 1) in self.defines else "float32"
        return _POINTED[type_name]

    def entry(self, name: str) -> str:
        """The symbol of `ENTRY(name)` in this variant."""
        return f"{name}_{self.storage}"
