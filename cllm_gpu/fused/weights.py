"""The weights of an optimizer's step as cuda/adam.cu takes them: masters and their copy, or the copy alone."""

from __future__ import annotations

from typing import Any

from cllm_gpu.errors import UserError
from cllm_gpu.fused.launcher import Shapes, storage_of
from cllm_gpu.reference.rounding import StochasticRounding


def weight_arguments(
    operation: str, parameters: Any, copy: Any | None, rounding: StochasticRounding | None
) -> dict[str, Any]:
    """The kernel's arguments for parameters (n) and copy (n) or None; UserError for a combination that has no meaning.

    With `rounding` the parameters are bfloat16, have no masters, and are what the kernel calls the copy.
    """
    check = Shapes(operation)
    check("parameters", parameters, "n")
    check("copy", copy, "n")
    if rounding is None:
        return {"parameters": parameters, "copy": copy, "seed": 0, "step": 0, "first": 0}
    if copy is not None or storage_of(operation, "parameters", parameters) != "bfloat16":
        raise UserError(f"{operation}: stochastic rounding is of bfloat16 parameters that have no copy")
    step = rounding.step & 0xFFFFFFFF
    return {
        "parameters": None,
        "copy": parameters,
        "seed": rounding.seed,
        "step": step,
        "first": rounding.first_element,
    }
