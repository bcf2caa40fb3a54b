"""cllm-gpu gradcheck"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from cllm_gpu.backend import BACKENDS, ENVIRONMENT_VARIABLE, Backend, get_backend
from cllm_gpu.cli import CHECK_FAILED
from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say
from cllm_gpu.config import ModelConfig
from cllm_gpu.model.gradcheck import BOUND, check_gradients
from cllm_gpu.report.gradcheck import gradient_data, print_checks
from cllm_gpu.report.table import write_json
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class GradcheckOptions:
    """Compare every gradient of a model with a numerical one, in float64."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(size="tiny"))
    vocabulary: int = 257
    """Vocabulary size of the model."""
    batch: int = 2
    """Batch size."""
    length: int | None = None
    """Sequence length in tokens (None: the context, at most 16)."""
    directions: int = 2
    """Random directions per parameter."""
    bound: float = BOUND
    """Largest relative error that passes."""
    seed: int = 1
    """Seed of the weights, the tokens and the directions."""
    backend: str | None = None
    """numpy or native, which compute in float64 (None: $CLLM_BACKEND or the faster one)."""
    output: Path | None = None
    """Also write the table to this file, as JSON."""


COMMAND = Command(
    "gradcheck",
    GradcheckOptions,
    examples="""
    # every gradient of the model tiny
    cllm-gpu gradcheck
    # rotary positions, one key/value head, no biases
    cllm-gpu gradcheck --model.positions rope --model.kv-heads 1 --model.no-bias
    # crystalline attention, with the reference implementation
    cllm-gpu gradcheck --model.attention crystalline --backend numpy
    """,
)


def main(arguments: list[str]) -> int:
    """Run the check. Returns exit status 0 if every parameter passes, else 1."""
    options = COMMAND.parse(arguments)
    backend = _float64_backend(options.backend)
    say(backend.description)
    checks = check_gradients(
        options.model.architecture(options.vocabulary),
        backend,
        batch=options.batch,
        length=options.length,
        seed=options.seed,
        directions=options.directions,
        bound=options.bound,
    )
    print_checks(checks)
    if options.output:
        write_json(options.output, gradient_data(checks))
    return 0 if all(check.passed for check in checks) else CHECK_FAILED


def _float64_backend(name: str | None) -> Backend:
    """The backend `name`, else $CLLM_BACKEND, else the faster one. Raises UserError for one without float64."""
    able = [each for each, kind in BACKENDS.items() if kind.has_float64]
    if name in BACKENDS and name not in able:
        raise UserError(f"--backend {name} computes in float32 and bfloat16; the check needs {' or '.join(able)}")
    if name is None:
        usual = os.environ.get(ENVIRONMENT_VARIABLE)
        has_native = find_compiler() is not None and os.name != "nt"
        name = usual if usual in able else "native" if has_native else "numpy"
    return get_backend(name, workers=1)
