"""From a typed dataclass to command-line flags (tyro), with errors of one line.

tyro makes the flags from the annotations and docstrings that the configuration has anyway, nested sections included,
with help and completion; argparse would need each flag written a second time.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, TypeVar

import tyro

from cllm_gpu.config import suggestion
from cllm_gpu.errors import UserError

Options = TypeVar("Options")


def parse(
    options: type[Options], arguments: list[str], *, command: str, default: Any = tyro.MISSING_NONPROP
) -> Options:
    """`options` filled from `arguments` over `default`. UserError for unknown flags and values of the wrong kind."""
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(options, args=["--help"], prog=f"cllm-gpu {command}", default=default, config=_STYLE)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(messages):
            parsed, unknown = tyro.cli(
                options,
                args=arguments,
                prog=f"cllm-gpu {command}",
                default=default,
                return_unknown_args=True,
                config=_STYLE,
            )
    except SystemExit:
        raise UserError(_one_line(messages.getvalue())) from None
    if unknown:
        raise UserError(_unknown(unknown[0], options, command, default))
    return parsed


_STYLE = (tyro.conf.AvoidSubcommands,)


def _one_line(text: str) -> str:
    """tyro's boxed message as one line: its first sentence, without the frame."""
    lines = [line.strip("│|+ ").strip() for line in text.splitlines()]
    spoken = [line for line in lines if line.strip("─-╭╮╰╯")]
    end = next((i for i, line in enumerate(spoken) if line.startswith(("Argument helptext", "For full help"))), None)
    return " ".join(spoken[:end]) or "these arguments cannot be understood"


def _unknown(flag: str, options: type[Any], command: str, default: Any) -> str:
    known = {word for word in _help(options, default).replace(",", " ").split() if word.startswith("--")}
    name = flag.split("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {flag!r}; `cllm-gpu {command} --help` lists the options"
    near = suggestion(name, known)
    hint = near if "mean" in near else f"; `cllm-gpu {command} --help` lists them"
    return f"unknown option {name}{hint}"


def _help(options: type[Any], default: Any) -> str:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(options, args=["--help"], default=default, config=_STYLE)
    return text.getvalue()
