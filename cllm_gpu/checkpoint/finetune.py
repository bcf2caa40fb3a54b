"""Training that begins from a model there is already: its weights, its shape and its tokenizer, and nothing else.

The optimizer, the schedule and the step start afresh, on whatever text; so a GPT-2 that was imported is fine-tuned.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.checkpoint import MODEL, load_model, model_manifest
from cllm_gpu.checkpoint.load_into import match_parameters, stored_architecture
from cllm_gpu.config import INITIAL, Config, DataConfig, ModelConfig
from cllm_gpu.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_dict, tokenizer_label
from cllm_gpu.model.architecture import SIZES, Architecture
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.utils.errors import UserError

_TRAINING_ONLY = {"dropout"}
"""What of an architecture no weight depends on: a run may choose it anew."""


@dataclass(frozen=True)
class Origin:
    """The model that a run began from."""

    path: Path
    """As it was given: a run or a checkpoint."""
    architecture: Architecture
    tokenizer: dict[str, Any]
    """As its checkpoint has it; empty for a model of bare token ids."""
    step: int
    sha256: str
    """Of the file with its weights."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifests of the run."""
        return {"path": os.path.abspath(self.path), "step": self.step, "sha256": self.sha256}


def find_origin(path: Path, which: Literal["best", "last"] = "best") -> Origin:
    """The model in a checkpoint, or in a run's best or last one, without its weights. UserError when there is none."""
    _, manifest = model_manifest(path, which)
    architecture = stored_architecture(manifest.content["architecture"], path)
    return Origin(path, architecture, manifest.content["tokenizer"], manifest.step, manifest.files[MODEL].sha256)


def initial_configuration(path: Path) -> Config:
    """The configuration of training from the model in `path`, before the file and the flags are applied."""
    origin = find_origin(path)
    kind = origin.tokenizer.get("kind")
    tokenizer = INITIAL if kind == "huggingface" else kind or "bytes"
    return Config(initial=path, model=ModelConfig.of(origin.architecture), data=DataConfig(tokenizer=tokenizer))


def require_same_shape(model: ModelConfig, origin: Origin) -> None:
    """UserError naming the first setting of `model` that contradicts the model it is to begin from."""
    found = dataclasses.asdict(origin.architecture)
    asked = dataclasses.asdict(model.architecture(model.vocabulary or origin.architecture.vocabulary))
    said = [(f"model.{name} is {value}", name, value) for name, value in asked.items() if name not in _TRAINING_ONLY]
    size = SIZES.get(model.size, {})
    said += [(f"model.size {model.size} has {name} {value}", name, value) for name, value in size.items()]
    for words, name, value in said:
        if value != found[name]:
            raise UserError(
                f"{words}, but training begins from the model in {origin.path}, where it is {found[name]}: "
                "leave the setting out"
            )


def tokenizer_of(config: Config, origin: Origin) -> Tokenizer | Literal["bytes"]:
    """The tokenizer of `origin`, for the data of a run that begins from it; "bytes" for a model of bare token ids.

    UserError when the configuration names another one.
    """
    if not origin.tokenizer:
        if config.data.tokenizer != "bytes":
            raise UserError(
                f"data.tokenizer is {config.data.tokenizer!r}, but the model in {origin.path} has none: "
                "import it with one, or leave the setting out and train on token ids"
            )
        return "bytes"
    own = tokenizer_from_dict(origin.tokenizer)
    if config.data.tokenizer == INITIAL:
        if config.data.end_of_text is not None:
            raise UserError("data.end_of_text is given, but data.tokenizer is initial: the model has its end of text")
    else:
        asked = load_tokenizer(config.data.tokenizer, config.data.end_of_text)
        if asked.fingerprint != own.fingerprint:
            named, needed = (tokenizer_label(one.name, one.fingerprint) for one in (asked, own))
            raise UserError(
                f"data.tokenizer is {named}, but training begins from the model in {origin.path}, where it is "
                f"{needed}: leave the setting out"
            )
    return own


def begin_from(config: Config, parameters: FlatParameters, tokenizer: Tokenizer | None, backend: Backend) -> Origin:
    """Copy the weights of the model in config.initial into `parameters`, rounded where these are narrower.

    UserError when it is of another kind.
    """
    assert config.initial is not None
    origin = find_origin(config.initial)
    require_same_shape(config.model, origin)
    own = tokenizer_from_dict(origin.tokenizer) if origin.tokenizer else None
    found, here = (tokenizer_label(one.name, one.fingerprint) if one else "none" for one in (own, tokenizer))
    if (own and own.fingerprint) != (tokenizer and tokenizer.fingerprint):
        raise UserError(f"the model in {origin.path} has another tokenizer: {found}, that of the data is {here}")
    match_parameters(load_model(config.initial).parameters, parameters, backend, rounded=True)
    return origin
