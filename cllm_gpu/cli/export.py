"""cllm-gpu export"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.pretrained import load_pretrained
from cllm_gpu.cli.formats import format_of
from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say


@dataclass(frozen=True)
class ExportOptions:
    """Write a model as a GPT-2 that Hugging Face transformers can load."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder or checkpoint."""
    output: Path
    """Folder to write; must be new or empty."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to use if the model is a run folder."""


COMMAND = Command(
    "export",
    ExportOptions,
    examples="""
    # the best model of a run
    cllm-gpu export runs/001 --output gpt2
    # its last checkpoint
    cllm-gpu export runs/001 --output gpt2-last --checkpoint last
    """,
)


def main(arguments: list[str]) -> int:
    """Export the model. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    trained = load_pretrained(options.model, get_backend("numpy", workers=1), options.checkpoint)
    for note in format_of(options.output).export_model(trained.model, trained.tokenizer, options.output):
        say(note)
    say(f"exported step {trained.step} of {options.model} to {options.output}")
    return 0
