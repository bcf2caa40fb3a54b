"""Formats of other programs, which `cllm-gpu import` reads and `cllm-gpu export` writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu import huggingface
from cllm_gpu.checkpoint.imported import Imported
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.model.transformer import Transformer


@dataclass(frozen=True)
class Format:
    """How a model is written and read."""

    export_model: Callable[[Transformer, Tokenizer | None, Path], tuple[str, ...]]
    """Writes the path, new or empty; a line for each thing that is left out. UserError for a model that the format
    cannot express."""
    import_model: Callable[[Path, Tokenizer | None], Imported]
    """The model at the path. tokenizer: overrides its own. Raises UserError if it cannot be read."""


FORMATS = {"": Format(huggingface.export_model, huggingface.import_model)}
"""By the suffix of a file; "" for a folder."""


def format_of(path: Path) -> Format:
    """The format of what is, or will be, at a path: a folder unless the suffix is one in FORMATS."""
    return FORMATS.get(path.suffix, FORMATS[""])
