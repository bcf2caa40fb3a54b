"""What a command needs before anything else is imported: standard streams that are open, and a Ctrl-C without a trace.

Imports only what Python itself has loaded when it starts.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import IO, Any

INTERRUPTED = 128 + signal.SIGINT
NOTICE = b"cllm-gpu: interrupted\n"


def open_standard_streams() -> None:
    """Make descriptors 0, 1 and 2 lead to the null device if they were closed.

    Else the next file opened takes such a place, and what is printed, by a library too, is written into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")


def _stream(descriptor: int, mode: str) -> IO[Any]:
    return open(descriptor, mode, encoding="utf-8", errors="replace", closefd=False)


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process with one line; for imports, which would answer it with a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interrupt_as_usual() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as without `leave_at_once`."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, NOTICE)
    finally:
        os._exit(INTERRUPTED)
