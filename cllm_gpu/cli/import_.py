"""cllm-gpu import"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.checkpoint.checkpoint import save_checkpoint
from cllm_gpu.cli.formats import format_of
from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say
from cllm_gpu.data.tokenizers import load_tokenizer
from cllm_gpu.training.run_folder import begin_run, lock_run


@dataclass(frozen=True)
class ImportOptions:
    """Read a GPT-2 in Hugging Face format into a run folder."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the model."""
    output: Path | None = None
    """Run folder to create (None: the next free number in runs/)."""
    tokenizer: str | None = None
    """"bytes", or the path of a tokenizer.json (None: the one in DIR)."""


COMMAND = Command(
    "import",
    ImportOptions,
    examples="""
    # into the next free folder in runs/
    cllm-gpu import gpt2
    # into a named folder, with another tokenizer
    cllm-gpu import gpt2 --output imported --tokenizer bytes
    """,
)


def main(arguments: list[str]) -> int:
    """Import the model. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    found = format_of(options.folder).import_model(options.folder, tokenizer)
    run = begin_run(options.output)
    with lock_run(run):
        save_checkpoint(run, found.checkpoint, keep_last=1, best=True)
    a, count = found.architecture, sum(array.size for array in found.checkpoint.parameters.values())
    for note in found.notes:
        say(note)
    say(
        f"imported {options.folder}: {count:,} parameters, {a.layers} layers, width {a.width}, {a.heads} heads, "
        f"context {a.context}, vocabulary {a.vocabulary}"
    )
    say(f"run folder {run}; train it further: cllm-gpu train --initial {run} --data.source …", unbroken=True)
    return 0
