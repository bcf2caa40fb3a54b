"""cllm-gpu generate"""

from __future__ import annotations

import io
import itertools
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.pretrained import load_pretrained, require_tokenizer
from cllm_gpu.cli.parsing import Command
from cllm_gpu.inference.generate import generate_text
from cllm_gpu.inference.sampling import Sampler
from cllm_gpu.training.run_folder import newest_run
from cllm_gpu.utils.text import visible


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt with a trained model; the text streams to standard output."""

    prompt: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")] = ""
    """What to continue (empty: begin a new document)."""
    model: Path | None = None
    """Run folder or checkpoint (None: the newest run)."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to use if the model is a run folder."""
    tokens: int = 200
    """Maximum number of tokens to generate; generation stops earlier at an end of text."""
    temperature: float = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample from the smallest set of most likely tokens with at least this total probability; 1: all."""
    seed: int = 1
    """Seed of the sampling."""
    cache: bool = True
    """Use a KV cache; without it the text is the same, but generation is slower."""
    backend: str | None = None
    """auto, numpy, native, cupy or simulator (None: $CLLM_BACKEND, else auto)."""


COMMAND = Command(
    "generate",
    GenerateOptions,
    examples="""
    # continue a prompt with the newest run's best model
    cllm-gpu generate "The number"
    # greedy decoding, at most 50 tokens
    cllm-gpu generate "The number" --temperature 0 --tokens 50
    # more variety, but without the least likely tokens
    cllm-gpu generate --model runs/001 --temperature 1 --top-p 0.95 --seed 7
    """,
)


def main(arguments: list[str]) -> int:
    """Generate text. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    sampler = Sampler(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    path = options.model or newest_run()
    trained = load_pretrained(path, get_backend(options.backend), options.checkpoint)
    tokenizer = require_tokenizer(trained, path)
    pieces = generate_text(
        trained.model, tokenizer, options.prompt, tokens=options.tokens, sampler=sampler, use_cache=options.cache
    )
    first = next(pieces, "")  # errors are raised here, before anything is written
    exact = _is_file(sys.stdout)
    for piece in itertools.chain((options.prompt, first), pieces):
        sys.stdout.write(piece if exact else visible(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def _is_file(stream: TextIO) -> bool:
    """Whether a stream goes to a regular file, which takes the text as it was generated, control characters too."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, io.UnsupportedOperation):
        return False
