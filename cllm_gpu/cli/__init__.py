"""The command line: one module per command, imported only when that command is run."""

from __future__ import annotations

import importlib
import io
import keyword
import logging
import os
import sys
from typing import Any

from cllm_gpu import __version__
from cllm_gpu.utils.dataclass_from_dict import did_you_mean
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.startup import INTERRUPTED, interrupt_as_usual
from cllm_gpu.utils.text import visible

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue a prompt with a trained model",
    "evaluate": "loss, perplexity, bits per byte and accuracy on a text",
    "tokenize": "train a tokenizer on a text, prepare token shards",
    "import": "read a GPT-2 in Hugging Face format into a run",
    "export": "write a model in Hugging Face format",
    "gradcheck": "compare every analytic gradient with a numerical one",
    "compare": "train with several optimizers, or variants of a model, and compare",
    "report": "tables and plots of finished runs",
    "lattice": "plot the lattice, and what a model learned of it",
    "info": "versions, device, and the implementation of each operation",
    "completion": "a shell script that completes commands and options",
}
CHECK_FAILED = 1
USER_ERROR = 2
STATUSES = {
    0: "success; with --training.minutes also a run that saved when the time was over",
    CHECK_FAILED: "a check failed (gradcheck), or standard output was closed",
    USER_ERROR: "invalid input or a missing requirement; one line on standard error says which",
    INTERRUPTED: "interrupted by Ctrl-C; train has saved a checkpoint",
}
"""Exit statuses of every command."""
SIGNALLED = 128
"""Exit status minus the signal's number where a signal stopped a command."""


def run(arguments: list[str]) -> int:
    """Run one command. Returns its exit status, one of STATUSES."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # do not fail on a character that the terminal cannot encode
    _show_notices()
    try:
        status = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except UserError as error:
        return _failed(str(error))
    except MemoryError as error:
        return _failed(f"out of memory ({error}): use a smaller batch or --training.micro-batch")
    except KeyboardInterrupt as interrupt:
        print("cllm-gpu: interrupted", file=sys.stderr)
        return interrupted_status(getattr(interrupt, "number", None))
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return CHECK_FAILED
    except OSError as error:  # unforeseen, such as a full disk under standard output: still no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _failed(str(error))


def interrupted_status(number: int | None) -> int:
    """The exit status after the signal of this number; None: Ctrl-C."""
    return INTERRUPTED if number is None else SIGNALLED + number


def _failed(error: str) -> int:
    from cllm_gpu.cli.progress import say, terminal  # imported late: keeps the start of every command fast

    say(f"cllm-gpu: error: {error}", terminal(errors=True))
    return USER_ERROR


def _show_notices() -> None:
    """Show log messages (such as a one-time compilation) on standard error if it is a terminal."""
    logger = logging.getLogger("cllm_gpu")
    if sys.stderr is not None and sys.stderr.isatty() and not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Visible())
        logger.addHandler(handler)


class _Visible(logging.Formatter):
    """Records as text that a terminal may receive."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else USER_ERROR
    if arguments[0] in ("-V", "--version"):
        print(f"cllm-gpu {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")
    command = load_command(name)
    interrupt_as_usual()  # all is imported
    return command.main(arguments[1:])


def load_command(name: str) -> Any:
    """The module of a command in COMMANDS. It defines `main(arguments)` and `COMMAND`, a `parsing.Command`."""
    return importlib.import_module(f"cllm_gpu.cli.{name}_" if keyword.iskeyword(name) else f"cllm_gpu.cli.{name}")


def _usage() -> str:
    lines = [f"cllm-gpu {__version__}: train language models with every gradient written by hand", ""]
    lines += ["usage: cllm-gpu COMMAND [OPTIONS]", ""]
    lines += [f"  {name:10s}  {text}" for name, text in COMMANDS.items()]
    lines += ["", "cllm-gpu COMMAND --help lists a command's options and shows examples.", "", "exit status:"]
    lines += [f"  {status:3d}  {text}" for status, text in STATUSES.items()]
    lines += ["  128 + n  stopped by signal n; train has saved"]
    return "\n".join(lines)
