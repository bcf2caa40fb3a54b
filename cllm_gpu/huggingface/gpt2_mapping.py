"""GPT-2's config.json and parameter names, and ours: what stands for what, and what one side cannot say.

Names and defaults are those of GPT2Config and GPT2LMHeadModel of the library transformers. Its linear layers
(Conv1D) keep their weights (inputs, outputs): the transpose of ours (outputs, inputs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer_norm import EPSILON
from cllm_gpu.utils.errors import UserError

ACTIVATION = "gelu_new"
"""GELU by tanh (Hendrycks and Gimpel 2016)."""
PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "wte.weight"
MASKS = (".attn.bias", ".attn.masked_bias")
"""Ends of the names of causal masks, which old files keep beside the weights."""

_SAME_ACTIVATION = (ACTIVATION, "gelu_pytorch_tanh", "gelu_fast")
_SHAPE = {
    "vocab_size": ("vocabulary", 50257),
    "n_positions": ("context", 1024),
    "n_embd": ("width", 768),
    "n_layer": ("layers", 12),
    "n_head": ("heads", 12),
}
"""Setting → (our name, what it is where a file does not say)."""
_FIXED: dict[str, tuple[Any, Any]] = {
    "layer_norm_epsilon": (1e-5, EPSILON),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "add_cross_attention": (False, False),
}
"""Setting → (what it is where a file does not say, the only value this package computes with)."""
_EXPRESSED = {*(ours for ours, _ in _SHAPE.values()), "mlp_width", "tied_head", "dropout", "lattice"}
"""Our settings that `write_config` writes, and the lattice, which is told of by another name."""
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_LINEARS = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "mlp_up": "mlp.c_fc", "mlp_down": "mlp.c_proj"}


def read_config(values: Any, name: str) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture that a config.json's content describes, and a line for each setting that is left out.

    `name` is for messages. UserError for another kind of model, and for a setting that would change its results here.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name} is no configuration of a model: expected names and values")
    kind = values.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{name} is of a model of type {kind!r}; only 'gpt2' can be imported")
    for setting, (default, ours) in _FIXED.items():
        _require(name, setting, values.get(setting, default), (ours,))
    _require(name, "activation_function", values.get("activation_function", ACTIVATION), _SAME_ACTIVATION)
    shape: dict[str, Any] = {
        ours: _whole_number(name, setting, values.get(setting, default)) for setting, (ours, default) in _SHAPE.items()
    }
    inner = values.get("n_inner")
    dropout, notes = _dropout(name, values)
    shape["mlp_width"] = 4 * shape["width"] if inner is None else _whole_number(name, "n_inner", inner)
    tied = values.get("tie_word_embeddings", True) is not False
    try:
        architecture = Architecture(**shape, kv_heads=shape["heads"], tied_head=tied, dropout=dropout)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return architecture, notes


def _require(name: str, setting: str, found: Any, known: tuple[Any, ...]) -> None:
    if found not in known:
        raise UserError(f"{name}: {setting} is {found!r}; this package computes only {' or '.join(map(repr, known))}")


def _whole_number(name: str, setting: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{name}: {setting} is {value!r}; it must be a whole number of at least 1")
    return value


def _dropout(name: str, values: dict[str, Any]) -> tuple[float, tuple[str, ...]]:
    """The dropout of the residual branches, ours, and what is said of the other two; it changes training only."""
    found = {}
    for setting in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        found[setting] = values.get(setting, 0.1)
        if type(found[setting]) not in (int, float) or not 0 <= found[setting] < 1:
            raise UserError(f"{name}: {setting} is {found[setting]!r}; it must be at least 0 and below 1")
    ours, embedding, attention = map(float, found.values())
    notes = []
    if attention:
        notes.append(f"attn_pdrop {attention:g} is left out: attention has no dropout here")
    if embedding != ours:
        notes.append(f"embd_pdrop {embedding:g} is left out: the embedding's dropout is here the branches', {ours:g}")
    return ours, tuple(notes)


def require_exportable(architecture: Architecture) -> None:
    """UserError for a model that GPT-2's configuration cannot describe, naming the setting and both values."""
    a = architecture
    settings = {"attention": ("standard" if a.lattice is None else "crystalline", "standard")}
    for name, needed in _needed(a).items():
        settings[name] = (getattr(a, name), needed)
    for setting, (found, needed) in settings.items():
        if found != needed:
            raise UserError(f"GPT-2 cannot express this model: {setting} is {found}, GPT-2 has only {needed}")


def _needed(a: Architecture) -> dict[str, Any]:
    """What GPT-2 has of every setting that its configuration has no name for: the defaults are GPT-2's."""
    fields = {f.name: f.default for f in dataclasses.fields(a) if f.name not in _EXPRESSED}
    return fields | {"kv_heads": a.heads}


def write_config(architecture: Architecture, ends: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of a model that `require_exportable` lets pass; `ends`: the ids that end a text."""
    a = architecture
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": a.vocabulary,
        "n_positions": a.context,
        "n_ctx": a.context,
        "n_embd": a.width,
        "n_layer": a.layers,
        "n_head": a.heads,
        "n_inner": None if a.mlp_width == 4 * a.width else a.mlp_width,
        "activation_function": ACTIVATION,
        "layer_norm_epsilon": EPSILON,
        "scale_attn_weights": True,
        "resid_pdrop": a.dropout,
        "embd_pdrop": a.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": a.tied_head,
        "bos_token_id": ends[0] if ends else None,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
        "torch_dtype": "float32",
    }


def parameter_names(architecture: Architecture) -> dict[str, tuple[str, bool]]:
    """Our name of each parameter → (GPT-2's, without its prefix; whether its weights are the transpose of ours)."""
    names = {"token_embedding": (EMBEDDING, False), "position_embedding": ("wpe.weight", False)}
    for layer in range(architecture.layers):
        for part, other in (_NORMS | _LINEARS).items():
            for kind in ("weight", "bias"):
                transposed = part in _LINEARS and kind == "weight"
                names[f"blocks.{layer}.{part}.{kind}"] = (f"h.{layer}.{other}.{kind}", transposed)
    names |= {f"final_norm.{kind}": (f"ln_f.{kind}", False) for kind in ("weight", "bias")}
    if not architecture.tied_head:
        names["head"] = (HEAD, False)
    return names
