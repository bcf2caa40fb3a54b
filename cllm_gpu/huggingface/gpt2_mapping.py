"""Mapping between GPT-2's config.json and parameter names and ours, and checks for what one side cannot express.

Names and defaults are those of GPT2Config and GPT2LMHeadModel of the library transformers. The weights of its linear
layers (Conv1D) have shape (inputs, outputs): the transpose of ours, (outputs, inputs).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer_norm import EPSILON
from cllm_gpu.utils.errors import UserError

ACTIVATION = "gelu_new"
"""GELU with the tanh approximation (Hendrycks and Gimpel 2016)."""
PREFIX = "transformer."
HEAD = "lm_head.weight"
EMBEDDING = "wte.weight"
MASKS = (".attn.bias", ".attn.masked_bias")
"""Suffixes of the causal masks that old files store with the weights."""

_SAME_ACTIVATION = (ACTIVATION, "gelu_pytorch_tanh", "gelu_fast")
_SHAPE = {
    "vocab_size": ("vocabulary", 50257),
    "n_positions": ("context", 1024),
    "n_embd": ("width", 768),
    "n_layer": ("layers", 12),
    "n_head": ("heads", 12),
}
"""Setting → (our name, default)."""
_FIXED: dict[str, tuple[Any, Any]] = {
    "layer_norm_epsilon": (1e-5, EPSILON),
    "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False),
    "add_cross_attention": (False, False),
}
"""Setting → (default, the only value this package supports)."""
_EXPRESSED = {*(ours for ours, _ in _SHAPE.values()), "mlp_width", "tied_head", "dropout", "lattice"}
"""Our settings that `write_config` writes, and the lattice, which `require_exportable` checks as "attention"."""
_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_LINEARS = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "mlp_up": "mlp.c_fc", "mlp_down": "mlp.c_proj"}


def read_config(values: Any, name: str) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture described by the content of a config.json, and a message for each setting that is ignored.

    name: for messages. Raises UserError for another model type, and for a setting that this package does not support.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name} is not a model configuration: expected names and values")
    kind = values.get("model_type")
    if kind != "gpt2":
        raise UserError(f"{name} has the model type {kind!r}; only 'gpt2' can be imported")
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
        raise UserError(f"{name}: {setting} is {found!r}; this package supports only {' or '.join(map(repr, known))}")


def _whole_number(name: str, setting: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{name}: {setting} is {value!r}; it must be a whole number of at least 1")
    return value


def _dropout(name: str, values: dict[str, Any]) -> tuple[float, tuple[str, ...]]:
    """Our dropout (that of the residual branches), and messages on the other two, which affect training only."""
    found = {}
    for setting in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        found[setting] = values.get(setting, 0.1)
        if type(found[setting]) not in (int, float) or not 0 <= found[setting] < 1:
            raise UserError(f"{name}: {setting} is {found[setting]!r}; it must be at least 0 and below 1")
    ours, embedding, attention = map(float, found.values())
    notes = []
    if attention:
        notes.append(f"attn_pdrop {attention:g} is ignored: attention has no dropout here")
    if embedding != ours:
        notes.append(f"embd_pdrop {embedding:g} is ignored: the embedding's dropout is that of the branches, {ours:g}")
    return ours, tuple(notes)


def require_exportable(architecture: Architecture) -> None:
    """Raises UserError for a model that GPT-2's configuration cannot describe, naming the setting and both values."""
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
    """The content of the config.json of a model that passes `require_exportable`; ends: the ids that end a text."""
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
    """Our parameter name → (GPT-2's name without prefix, whether its array is the transpose of ours)."""
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
