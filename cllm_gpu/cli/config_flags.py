"""What the commands that train have in common: the TOML file under the flags, and the data they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from cllm_gpu.checkpoint.finetune import find_origin, initial_configuration, require_same_shape, tokenizer_of
from cllm_gpu.cli.progress import ConsoleReporter
from cllm_gpu.config import Config, load_toml
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import Tokenizer, load_tokenizer
from cllm_gpu.utils.compiler import cache_directory


def early_flags(arguments: list[str]) -> argparse.Namespace:
    """Flags that decide what the others stand over: config, experiment, initial, output, resume.

    Mistakes are `parse`'s.
    """
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--output", type=Path, nargs="?")
    early.add_argument("--config", type=Path, nargs="?")
    early.add_argument("--experiment", type=Path, nargs="?")
    early.add_argument("--initial", type=Path, nargs="?")
    early.add_argument("--resume", action="store_true")
    try:
        known, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError:
        return argparse.Namespace(output=None, config=None, experiment=None, initial=None, resume=False)
    return known


def base_configuration(arguments: list[str]) -> Config:
    """The configuration of the file named by --config, else the defaults; with --initial those of a model there is."""
    known = early_flags(arguments)
    file = load_toml(known.config) if known.config else Config()
    initial = known.initial or file.initial
    if initial is None:
        return file
    under = initial_configuration(initial)
    return load_toml(known.config, under) if known.config else under


def open_data(config: Config, display: ConsoleReporter, resumed: Path | None = None) -> Dataset:
    """The dataset of a configuration, prepared with progress where it is not in the cache yet.

    `resumed`: the run that goes on. The tokenizer is the model's, where there is one to begin from or to go on with.
    """
    tokenizer: str | Tokenizer = config.data.tokenizer
    if config.initial is None and config.data.end_of_text is not None:
        tokenizer = load_tokenizer(config.data.tokenizer, config.data.end_of_text)
    if config.initial is not None:
        origin = find_origin(resumed, "last") if resumed else find_origin(config.initial)
        require_same_shape(config.model, origin)
        tokenizer = tokenizer_of(config, origin)
    context = config.model.architecture(vocabulary=config.model.vocabulary or 2).context
    with display.preparing() as progress:
        return open_dataset(
            config.data.source,
            tokenizer=tokenizer,
            validation_fraction=config.data.validation_fraction,
            seed=config.data.seed,
            cache_folder=config.data.cache or cache_directory() / "data",
            context=context,
            progress=progress,
            options=TextOptions(config.data.text_field, config.data.separator),
            validation=config.data.validation,
            dtype=config.data.dtype,
        )
