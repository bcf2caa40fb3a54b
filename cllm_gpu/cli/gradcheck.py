"""cllm-gpu gradcheck"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cllm_gpu.backend import get_backend
from cllm_gpu.cli import CHECK_FAILED
from cllm_gpu.cli.parsing import Command
from cllm_gpu.config import ModelConfig
from cllm_gpu.display import say
from cllm_gpu.reporting import gradient_data, print_checks, write_json
from cllm_gpu.verification import BOUND, check_gradients


@dataclass(frozen=True)
class GradcheckOptions:
    """Compare every analytic gradient of a model with a numerical one, in float64; exit status 1 if any differs."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(size="tiny"))
    vocabulary: int = 257
    """Token ids of the model."""
    batch: int = 2
    """Sequences."""
    length: int | None = None
    """Tokens in a sequence (None: the context, at most 16)."""
    directions: int = 2
    """Directions tried for each parameter."""
    bound: float = BOUND
    """Largest relative error that passes."""
    seed: int = 1
    """Of the weights, the tokens and the directions."""
    backend: str | None = None
    """auto, numpy, native, cupy or simulator (None: $CLLM_BACKEND, else auto)."""
    output: Path | None = None
    """Also write the table as JSON."""


COMMAND = Command(
    "gradcheck",
    GradcheckOptions,
    examples="""
    # every gradient of the model tiny
    cllm-gpu gradcheck
    # rotary positions, one key/value head, no biases
    cllm-gpu gradcheck --model.positions rope --model.kv-heads 1 --model.no-bias
    # the CUDA kernels, run on the CPU
    cllm-gpu gradcheck --backend simulator --model.layers 1 --model.width 8 --length 4
    """,
)


def main(arguments: list[str]) -> int:
    """Check; exit status 0 when every group passes, else 1."""
    options = COMMAND.parse(arguments)
    backend = get_backend(options.backend, workers=1)
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
