"""A trained model as its checkpoint holds it: the transformer and its tokenizer, on a backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.checkpoint import load_model
from cllm_gpu.checkpoint.load_into import match_parameters, stored_architecture
from cllm_gpu.data.tokenizers import Tokenizer, tokenizer_from_dict
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import wide_dtype
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class PretrainedModel:
    """What `load_pretrained` finds in a checkpoint."""

    model: Transformer
    tokenizer: Tokenizer | None
    step: int


def load_pretrained(path: Path, backend: Backend, which: Literal["best", "last"] = "best") -> PretrainedModel:
    """The model of a checkpoint, or of a run folder's best or last checkpoint. UserError when it cannot be used."""
    checkpoint = load_model(path, which)
    architecture = stored_architecture(checkpoint.architecture, path)
    stored = next(iter(checkpoint.parameters.values())).dtype if checkpoint.parameters else np.float32
    dtype = wide_dtype(stored)  # weights held in bf16 alone are read exactly, and every backend computes in float32
    layout = Layout(parameter_specs(architecture), dtype)
    parameters = layout.views(backend.zeros(layout.size, dtype))
    match_parameters(checkpoint.parameters, parameters, backend)
    tokenizer = tokenizer_from_dict(checkpoint.tokenizer) if checkpoint.tokenizer else None
    return PretrainedModel(Transformer(architecture, backend, parameters), tokenizer, checkpoint.step)


def require_tokenizer(trained: PretrainedModel, path: Path) -> Tokenizer:
    """The model's tokenizer. UserError when it was trained on bare token ids."""
    if trained.tokenizer is None:
        raise UserError(f"the model in {path} was trained on token ids without a tokenizer: it cannot read text")
    return trained.tokenizer
