"""What the commands that train have in common: the TOML file under the flags, and the data they name."""

from __future__ import annotations

import argparse
from pathlib import Path

from cllm_gpu.compiler import cache_directory
from cllm_gpu.config import Config, load_toml
from cllm_gpu.data import Dataset, open_dataset
from cllm_gpu.display import Display


def early_flags(arguments: list[str]) -> argparse.Namespace:
    """Flags that decide what the others stand over: config, experiment, output, resume; mistakes are `parse`'s."""
    early = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    early.add_argument("--output", type=Path, nargs="?")
    early.add_argument("--config", type=Path, nargs="?")
    early.add_argument("--experiment", type=Path, nargs="?")
    early.add_argument("--resume", action="store_true")
    try:
        known, _ = early.parse_known_args(arguments)
    except argparse.ArgumentError:
        return argparse.Namespace(output=None, config=None, experiment=None, resume=False)
    return known


def base_configuration(arguments: list[str]) -> Config:
    """The configuration of the file named by --config, else the defaults."""
    known = early_flags(arguments)
    return load_toml(known.config) if known.config else Config()


def open_data(config: Config, display: Display) -> Dataset:
    """The dataset of a configuration, prepared with progress where it is not in the cache yet."""
    context = config.model.architecture(vocabulary=2).context
    with display.preparing() as progress:
        return open_dataset(
            config.data.source,
            tokenizer=config.data.tokenizer,
            validation_fraction=config.data.validation_fraction,
            seed=config.data.seed,
            cache_folder=config.data.cache or cache_directory() / "data",
            context=context,
            progress=progress,
        )
