"""Imports a GPT-2 in Hugging Face format as a checkpoint; float32 weights are preserved bit for bit.

config.json                    the architecture; unsupported settings are an error
model.safetensors              or its shards, listed in model.safetensors.index.json
tokenizer.json                 or vocab.json and merges.txt; optional, without it the model works on token ids only
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu.checkpoint.checkpoint import MODEL, Checkpoint
from cllm_gpu.checkpoint.imported import Imported
from cllm_gpu.checkpoint.safetensors_io import each_tensor
from cllm_gpu.checkpoint.soundness import require_finite
from cllm_gpu.config import Config, ModelConfig, as_dict
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.huggingface.gpt2_mapping import EMBEDDING, HEAD, MASKS, PREFIX, parameter_names, read_config
from cllm_gpu.huggingface.tokenizer_json import MERGES, TOKENIZER, VOCABULARY, read_tokenizer
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import FlatParameters, Layout, parameter_specs
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_FLOATS = ("float32", "bfloat16", "float16")


def import_model(folder: Path, tokenizer: Tokenizer | None = None) -> Imported:
    """The GPT-2 in `folder` as a float32 checkpoint at step 0. tokenizer: overrides the folder's (None: the folder's).

    bfloat16 and float16 weights are converted to float32 exactly. Raises UserError if a file is missing or damaged, or
    if this package does not support the model.
    """
    config_path = folder / CONFIG
    architecture, notes = read_config(_read_json(config_path), str(config_path))
    files = _weight_files(folder)
    found = tokenizer or read_tokenizer(folder)
    if found is not None and found.vocabulary > architecture.vocabulary:
        raise UserError(
            f"the tokenizer of {folder} has {found.vocabulary} ids, vocab_size in {config_path} is "
            f"{architecture.vocabulary}: they do not belong together"
        )
    if found is not None:
        notes += found.notes
    else:
        notes += (f"{folder} has no {TOKENIZER} (nor {VOCABULARY}, {MERGES}): the model works on token ids only",)
    checkpoint = Checkpoint(
        config=as_dict(Config(model=ModelConfig.of(architecture))),
        architecture=architecture.as_dict(),
        tokenizer=found.as_dict() if found else {},
        step=0,
        state={"imported_from": str(folder)},
        parameters=dict(_read_parameters(architecture, files)),
        optimizer={},
    )
    return Imported(checkpoint, architecture, found, notes)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the folder of a model in Hugging Face format")
    try:
        with clear_errors("read", path):
            return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards listed in its index."""
    if (folder / MODEL).is_file():
        return [folder / MODEL]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is not read: save the model as safetensors)" if pickled else ""
        raise UserError(f"{folder} has no {MODEL}{hint}")
    listed = _read_json(index)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise UserError(f"{index} has no weight_map of names and files beside it")
    return [folder / name for name in sorted(set(names.values()))]


def _read_parameters(architecture: Architecture, files: list[Path]) -> FlatParameters:
    """The weights in our layout. Raises UserError naming the first tensor that is missing, unexpected, or of another
    shape or dtype."""
    layout = Layout(parameter_specs(architecture), np.float32)
    parameters = layout.views(np.zeros(layout.size, np.float32))
    wanted = {theirs: (ours, transposed) for ours, (theirs, transposed) in parameter_names(architecture).items()}
    missing = dict.fromkeys(wanted)
    tied_head = None
    for name, tensor, path in _tensors(files):
        if name == HEAD and architecture.tied_head:
            tied_head = tensor  # some files store it although it is the embedding
            continue
        if name not in wanted:
            raise UserError(f"{path}: {name} {list(tensor.shape)} is not a parameter of a GPT-2 of this configuration")
        ours, transposed = wanted[name]
        view = parameters[ours].T if transposed else parameters[ours]
        if tensor.shape != view.shape:
            raise UserError(
                f"{path}: {name} is {list(tensor.shape)}, {CONFIG} makes it {list(view.shape)}: they disagree"
            )
        require_finite({name: tensor}, path, "such a model computes nothing: get the file anew")
        view[...] = tensor
        missing.pop(name, None)
    if missing:
        raise UserError(f"{next(iter(missing))} is missing from {', '.join(path.name for path in files)}")
    if tied_head is not None and not np.array_equal(tied_head.astype(np.float32), parameters["token_embedding"]):
        raise UserError(f"{HEAD} differs from {EMBEDDING}, but {CONFIG} ties them: set tie_word_embeddings to false")
    return parameters


def _tensors(files: list[Path]) -> Iterator[tuple[str, np.ndarray[Any, Any], Path]]:
    """(name without prefix, array, file) of every tensor except masks. Raises UserError for a dtype not in _FLOATS."""
    for path in files:
        for name, tensor in each_tensor(path):
            if name.endswith(MASKS) and re.match(rf"({re.escape(PREFIX)})?h\.\d+\.", name):
                continue
            if tensor.dtype.name not in _FLOATS:
                raise UserError(f"{path}: {name} is {tensor.dtype.name}; weights must be {', '.join(_FLOATS)}")
            yield name.removeprefix(PREFIX), tensor, path
