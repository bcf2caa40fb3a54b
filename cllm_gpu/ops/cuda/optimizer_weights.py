"""The weights of an optimizer step as arguments of cuda/adam.cu: masters and their copy, or the copy alone."""

from __future__ import annotations

from typing import Any

from cllm_gpu.ops.cuda.checks import Shapes, storage_of
from cllm_gpu.ops.cuda.dropout import draw_number
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.utils.errors import UserError

WITHOUT_MASTERS = (("CLLM_WITHOUT_MASTERS", 1),)


def weight_arguments(
    launcher: Launcher,
    operation: str,
    gradients: Any,
    parameters: Any,
    copy: Any | None,
    rounding: StochasticRounding | None,
) -> tuple[Variant, dict[str, Any]]:
    """The variant for parameters (n), gradients (n) and copy (n) or None, and the kernel arguments for the weights.

    With `rounding`, the parameters are bfloat16 without masters and are passed as the kernel's `copy`. Raises UserError
    for an invalid combination.
    """
    check = Shapes(operation)
    kind = storage_of(operation, "gradients", gradients)
    check("parameters", parameters, "n")
    check("copy", copy, "n")
    if rounding is None:
        unused = {"rounding.seed": 0, "rounding.step": None, "rounding.first_element": 0}
        storage = kind if copy is None else storage_of(operation, "copy", copy)
        return Variant("adam.cu", storage, kind), {"parameters": parameters, "copy": copy, **unused}
    if copy is not None or storage_of(operation, "parameters", parameters) != "bfloat16":
        raise UserError(f"{operation}: stochastic rounding is of bfloat16 parameters that have no copy")
    draws = {
        "rounding.seed": rounding.seed,
        "rounding.step": draw_number(launcher, rounding.step),
        "rounding.first_element": rounding.first_element,
    }
    return Variant("adam.cu", "bfloat16", kind, WITHOUT_MASTERS), {"parameters": None, "copy": parameters, **draws}
