"""A model of another program, as it was read."""

from __future__ import annotations

from dataclasses import dataclass

from cllm_gpu.checkpoint.checkpoint import Checkpoint
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.model.architecture import Architecture


@dataclass(frozen=True)
class Imported:
    """What was found in a folder or file."""

    checkpoint: Checkpoint
    architecture: Architecture
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]
    """A line for each thing that is left out."""
