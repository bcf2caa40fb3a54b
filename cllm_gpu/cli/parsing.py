"""From a typed dataclass to command-line flags (tyro), with errors of one line and help that ends with examples.

tyro makes the flags from the annotations and docstrings that the configuration has anyway, nested sections included;
argparse would need each flag written a second time.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro

from cllm_gpu.config_aliases import setting_of
from cllm_gpu.utils.dataclass_from_dict import did_you_mean
from cllm_gpu.utils.errors import UserError

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Quietable:
    """The flag of every command that shows progress. `display.terminal(quiet=…)` obeys it, and `parse` for notices."""

    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"]), tyro.conf.FlagCreatePairsOff] = False
    """Show no progress and no messages: only errors, and a result that is written to no file."""


@dataclass(frozen=True)
class Command(Generic[Options]):
    """What the command line knows of a command; its help, its errors and its completion are made from this."""

    name: str
    options: type[Options]
    """A dataclass. Its docstring begins the help."""
    examples: str
    """Lines of a shell, each with a comment above it. They end the help."""
    short: tuple[tuple[str, str], ...] = ()
    """(short name, flag): flags of the configuration that may be given without their section."""

    def parse(self, arguments: list[str], default: Any = tyro.MISSING_NONPROP) -> Options:
        """`options` filled from `arguments` over `default`; for --help the help instead, and SystemExit.

        UserError for unknown flags and values of the wrong kind.
        """
        if {"-h", "--help"} & set(arguments):
            self._show_help(default)
        arguments = [self._in_full(word) for word in arguments]
        messages = io.StringIO()
        try:
            with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
                parsed, unknown = tyro.cli(
                    self.options,
                    args=arguments,
                    prog=f"cllm-gpu {self.name}",
                    default=default,
                    return_unknown_args=True,
                    config=_STYLE,
                )
        except SystemExit:
            raise UserError(_one_line(messages.getvalue())) from None
        if unknown:
            raise UserError(self._unknown(unknown[0], default))
        quiet = isinstance(parsed, Quietable) and parsed.quiet
        logging.getLogger("cllm_gpu").setLevel(logging.WARNING if quiet else logging.INFO)
        return parsed

    def _in_full(self, word: str) -> str:
        """A flag by its own name, where a short name or another trainer's stands for it."""
        name, equals, value = word.partition("=")
        if name.startswith("--") and "." in name:
            given = name[2:].replace("-", "_")
            if (setting := setting_of(given)) != given:
                name = f"--{setting.replace('_', '-')}"
        return dict(self.short).get(name, name) + equals + value

    def _tyro_help(self, default: Any) -> None:
        with contextlib.suppress(SystemExit):
            tyro.cli(self.options, args=["--help"], prog=f"cllm-gpu {self.name}", default=default, config=_STYLE)

    def _show_help(self, default: Any) -> NoReturn:
        self._tyro_help(default)
        if self.short:
            print(f"\nshort: {', '.join(f'{name} for {flag}' for name, flag in self.short)}")
        print(f"\nexamples:\n{textwrap.indent(inspect.cleandoc(self.examples), '  ')}")
        raise SystemExit(0)

    def _unknown(self, flag: str, default: Any) -> str:
        """One line on an argument that the command does not have."""
        name = flag.split("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {flag!r}; `cllm-gpu {self.name} --help` lists the options"
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            self._tyro_help(default)
        known = {word for word in text.getvalue().replace(",", " ").split() if word.startswith("--")}
        near = did_you_mean(name, known)
        return f"unknown option {name}{near if 'mean' in near else f'; `cllm-gpu {self.name} --help` lists them'}"


_STYLE = (tyro.conf.AvoidSubcommands,)


def _one_line(text: str) -> str:
    """tyro's boxed message as one line: without the frame, its title, and the help below the message."""
    spoken = [line for line in map(str.strip, text.splitlines()) if line.strip("-─│╭╮╰╯ ")]
    end = next((i for i, line in enumerate(spoken) if line.startswith(_BELOW_THE_MESSAGE)), None)
    first, *rest = spoken[1:end] or ["these arguments cannot be understood"]
    if first.startswith("Missing from ") and rest:
        return f"{rest[0]} is missing: {' '.join(rest[1:]).removesuffix(' (required)')}"
    return " ".join([first, *rest])


_BELOW_THE_MESSAGE = ("Argument helptext", "For full help", "Got errors")
