"""cllm-gpu completion"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cllm_gpu.cli import COMMANDS, load_command
from cllm_gpu.cli.completion_flags import Flag, command_flags
from cllm_gpu.cli.completion_scripts import SCRIPTS
from cllm_gpu.cli.parsing import Command


@dataclass(frozen=True)
class CompletionOptions:
    """Print a shell script that completes commands, options and values."""

    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell to generate the script for."""


COMMAND = Command(
    "completion",
    CompletionOptions,
    examples="""
    # bash: write it once, and source it from ~/.bashrc
    cllm-gpu completion bash > ~/.cllm-gpu.bash
    echo "source ~/.cllm-gpu.bash" >> ~/.bashrc
    # zsh: the same; source it from ~/.zshrc below compinit
    cllm-gpu completion zsh > ~/.cllm-gpu.zsh
    # fish loads it automatically
    cllm-gpu completion fish > ~/.config/fish/completions/cllm-gpu.fish
    """,
)


def main(arguments: list[str]) -> int:
    """Print the script. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    print(SCRIPTS[options.shell](COMMANDS, every_flag()), end="")
    return 0


def every_flag() -> dict[str, list[Flag]]:
    """Command → its flags."""
    return {name: command_flags(load_command(name).COMMAND.options) for name in COMMANDS}
