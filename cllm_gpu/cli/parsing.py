"""Command-line flags from a typed dataclass (tyro), with one-line errors and a help text that ends with examples.

tyro derives the flags from the annotations and docstrings of the configuration, including nested sections; argparse
would need each flag to be defined a second time.
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
class QuietOption:
    """The flag --quiet of every command that shows progress. Applied by `progress.terminal` and `Command.parse`."""

    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"]), tyro.conf.FlagCreatePairsOff] = False
    """Suppress progress and messages: print only errors, and results that are not written to a file."""


@dataclass(frozen=True)
class Command(Generic[Options]):
    """Definition of a command, from which its help, errors and completion are generated."""

    name: str
    options: type[Options]
    """A dataclass with a field per flag. Its docstring is the start of the help."""
    examples: str
    """Shell commands, each with a comment above it: the end of the help."""
    short: tuple[tuple[str, str], ...] = ()
    """(short name, flag) of configuration flags that can be given without their section."""

    def parse(self, arguments: list[str], default: Any = tyro.MISSING_NONPROP) -> Options:
        """Parse `arguments` into an instance of `options`; `default` has the values of flags not given.

        With --help, prints the help and raises SystemExit. Raises UserError for unknown flags and invalid values.
        """
        if {"-h", "--help"} & set(arguments):
            self._show_help(default)
        arguments = [self._canonical(word) for word in arguments]
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
        quiet = isinstance(parsed, QuietOption) and parsed.quiet
        logging.getLogger("cllm_gpu").setLevel(logging.WARNING if quiet else logging.INFO)
        return parsed

    def _canonical(self, word: str) -> str:
        """The canonical form of a flag given by a short name or by another trainer's name for it."""
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
        """The error message for an unknown argument."""
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
    """tyro's boxed error message as one line, without the frame, its title, and the help below the message."""
    spoken = [line for line in map(str.strip, text.splitlines()) if line.strip("-─│╭╮╰╯ ")]
    end = next((i for i, line in enumerate(spoken) if line.startswith(_BELOW_THE_MESSAGE)), None)
    first, *rest = spoken[1:end] or ["these arguments cannot be understood"]
    if first.startswith("Missing from ") and rest:
        return f"{rest[0]} is missing: {' '.join(rest[1:]).removesuffix(' (required)')}"
    return " ".join([first, *rest])


_BELOW_THE_MESSAGE = ("Argument helptext", "For full help", "Got errors")
