"""Names that other trainers give to settings of this one: accepted in TOML files and as flags, written nowhere.

nanoGPT (n_layer, n_embd, block_size, batch_size, learning_rate, grad_clip …), transformers (hidden_size,
num_attention_heads, learning_rate, max_steps, max_grad_norm …) and PyTorch's optimizers (lr, eps).
"""

from __future__ import annotations

from typing import Any

from cllm_gpu.utils.errors import UserError

ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "layers": ("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
        "heads": ("n_head", "n_heads", "num_heads", "num_attention_heads"),
        "kv_heads": ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
        "width": ("d_model", "n_embd", "hidden_size"),
        "mlp_width": ("d_ff", "n_inner", "intermediate_size"),
        "context": ("block_size", "context_length", "n_positions", "seq_len", "max_position_embeddings"),
        "vocabulary": ("vocab_size",),
    },
    "optimizer": {
        "rate": ("lr", "learning_rate"),
        "epsilon": ("eps",),
        "clip_norm": ("grad_clip", "max_grad_norm"),
    },
    "schedule": {
        "warmup_steps": ("warmup_iters", "num_warmup_steps"),
        "minimum_rate": ("min_lr",),
    },
    "training": {
        "steps": ("max_steps", "max_iters", "num_steps"),
        "batch": ("batch_size",),
        "micro_batch": ("micro_batch_size",),
    },
}
"""Section → setting → its other names."""
_SETTING = {
    f"{section}.{alias}": f"{section}.{setting}"
    for section, settings in ALIASES.items()
    for setting, aliases in settings.items()
    for alias in aliases
}


def setting_of(name: str) -> str:
    """The setting that a dotted name stands for: itself unless it is an alias.

    >>> setting_of("optimizer.lr")
    'optimizer.rate'
    """
    return _SETTING.get(name, name)


def in_full(values: dict[str, Any]) -> dict[str, Any]:
    """The nested values of a configuration file with every alias replaced by its setting.

    UserError if a file gives a setting by two names.
    """
    return {name: _section(name, entries) if isinstance(entries, dict) else entries for name, entries in values.items()}


def _section(section: str, entries: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in entries.items():
        setting = setting_of(f"{section}.{name}").partition(".")[2]
        if setting in given:
            raise UserError(
                f"{section}.{given[setting]} and {section}.{name} are names of one setting, {setting}: give one of them"
            )
        given[setting], found[setting] = name, value
    return found
