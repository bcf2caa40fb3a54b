"""Shared by the commands that train: the defaults of the flags (a TOML file or a model), and opening the data."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from cllm_gpu.checkpoint.checkpoint import Checkpoint
from cllm_gpu.checkpoint.finetune import find_origin, initial_configuration, require_same_shape, tokenizer_of
from cllm_gpu.cli.progress import ConsoleReporter
from cllm_gpu.config import Config, from_dict, load_toml, with_absolute_paths
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.data.dataset import reopen_prepared
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_dict
from cllm_gpu.utils.library_cache import cache_directory


def early_flags(arguments: list[str]) -> argparse.Namespace:
    """The flags that select the defaults of the others: checkpoint, config, experiment, initial, output, resume.

    Reports no errors; `Command.parse` does.
    """
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--output", type=Path, nargs="?")
    early.add_argument("--config", type=Path, nargs="?")
    early.add_argument("--experiment", type=Path, nargs="?")
    early.add_argument("--checkpoint", type=Path, nargs="?")
    early.add_argument("--initial", type=Path, nargs="?")
    early.add_argument("--resume", action="store_true")
    try:
        known, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError:
        return early.parse_args([])
    return known


def base_configuration(arguments: list[str]) -> Config:
    """The configuration that flags override: the defaults, with --initial those of that model, then --config's file."""
    known = early_flags(arguments)
    file = load_toml(known.config) if known.config else Config()
    initial = known.initial or file.initial
    if initial is None:
        return file
    under = initial_configuration(initial)
    return load_toml(known.config, under) if known.config else under


def open_data(config: Config, display: ConsoleReporter, resumed: Checkpoint | None = None) -> Dataset:
    """The dataset of a configuration, prepared with a progress bar unless it is in the cache.

    resumed: the checkpoint that a run resumes from, else None. Its tokenizer and the tokens prepared for it are used
    unless the settings changed, so neither the text nor a tokenizer file is needed. With `config.initial`, the
    tokenizer is that model's.
    """
    tokenizer: str | Tokenizer = config.data.tokenizer
    options = TextOptions(config.data.text_field, config.data.separator)
    cache = config.data.cache or cache_directory() / "data"
    own = with_absolute_paths(from_dict(resumed.config)).data if resumed else None
    asked = with_absolute_paths(config).data
    if resumed is not None and own is not None:
        if resumed.tokenizer and (asked.tokenizer, asked.end_of_text) == (own.tokenizer, own.end_of_text):
            tokenizer = tokenizer_from_dict(resumed.tokenizer)
        if not isinstance(tokenizer, str) and dataclasses.replace(asked, cache=own.cache) == own:
            found = reopen_prepared(
                config.data.source, tokenizer, identity=resumed.state["data"],
                fraction=config.data.validation_fraction, seed=config.data.seed, cache=cache,
                options=options, validation=config.data.validation,
            )  # fmt: skip
            if found is not None:
                dataset, line = found
                if line is not None:
                    display.message(line)
                return dataset
    elif config.initial is not None:
        origin = find_origin(config.initial)
        require_same_shape(config.model, origin)
        tokenizer = tokenizer_of(config, origin)
    if isinstance(tokenizer, str) and config.data.end_of_text is not None:
        tokenizer = load_tokenizer(tokenizer, config.data.end_of_text)
    context = config.model.architecture(vocabulary=config.model.vocabulary or 2).context
    with display.preparing() as progress:
        return open_dataset(
            config.data.source,
            tokenizer=tokenizer,
            validation_fraction=config.data.validation_fraction,
            seed=config.data.seed,
            cache_folder=cache,
            context=context,
            progress=progress,
            options=options,
            validation=config.data.validation,
            dtype=config.data.dtype,
        )
