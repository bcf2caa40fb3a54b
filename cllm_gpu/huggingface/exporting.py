"""Exports a model to a folder for GPT2LMHeadModel.from_pretrained and AutoTokenizer.from_pretrained of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.checkpoint.checkpoint import MODEL
from cllm_gpu.checkpoint.safetensors_io import write_synced, write_tensors
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.huggingface.gpt2_mapping import HEAD, PREFIX, parameter_names, require_exportable, write_config
from cllm_gpu.huggingface.importing import CONFIG
from cllm_gpu.huggingface.tokenizer_json import TOKENIZER, tokenizer_config, tokenizer_text
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import PARTIAL, clear_errors, remove, sync_folder

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"

Array = np.ndarray[Any, Any]


def export_model(model: Transformer, tokenizer: Tokenizer | None, target: Path) -> tuple[str, ...]:
    """Write the model in float32 to the new folder `target`. Returns a message for each part that is not exported.

    Ids that no token has, such as those that pad the vocabulary, are suppressed in generation_config.json: generation
    by transformers does not pick them, like ours. The folder appears only when it is complete. Raises UserError for a
    model that GPT-2 cannot express, and if the folder is not empty or cannot be written.
    """
    a = model.architecture
    require_exportable(a)
    text = tokenizer_text(tokenizer) if tokenizer else None
    documents = {CONFIG: _json(write_config(a, tokenizer.ends if tokenizer and text else ()))}
    if tokenizer and text:
        documents[TOKENIZER] = text
        documents[TOKENIZER_CONFIG] = _json(tokenizer_config(tokenizer, text, a.context))
        unused = [*tokenizer.unused, *range(tokenizer.vocabulary, a.vocabulary)]
        if unused:
            ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": list(tokenizer.ends)}
            documents[GENERATION_CONFIG] = _json({**ends, "suppress_tokens": unused})
    _write_folder(target, documents, _renamed(model))
    return () if text else (_without(tokenizer),)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _without(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "the model has no tokenizer: none is exported"
    return f"the tokenizer {tokenizer.as_dict()['kind']} has no Hugging Face form: none is exported"


def _renamed(model: Transformer) -> dict[str, Array]:
    """GPT-2's parameter names → float32 arrays on the host; views of the model's arrays if these are float32."""
    arrays = {}
    for ours, (theirs, transposed) in parameter_names(model.architecture).items():
        array = model.backend.to_host(model.parameters[ours]).astype(np.float32, copy=False)
        arrays[theirs if theirs == HEAD else PREFIX + theirs] = array.T if transposed else array
    return arrays


def _write_folder(target: Path, documents: dict[str, str], weights: dict[str, Array]) -> None:
    """Write everything to a temporary folder, sync it, and rename it to `target`."""
    place = target.absolute()
    partial = place.with_name(f".{place.name}{PARTIAL}")
    with clear_errors("write", target, sum(array.nbytes for array in weights.values())):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"{target} exists already and is not empty; choose another --output")
        remove(partial)
        partial.mkdir(parents=True)
        try:
            write_tensors(partial / MODEL, weights, written_for="pt")
            for name, text in documents.items():
                write_synced(partial / name, iter([text.encode()]))
            sync_folder(partial)
            if place.exists():
                place.rmdir()
            partial.rename(place)
        except BaseException:
            remove(partial)
            raise
        sync_folder(place.parent)
