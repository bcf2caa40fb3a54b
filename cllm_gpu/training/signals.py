"""Ctrl-C and termination asked of long work: the first request is noted and answered, the second interrupts at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

NOTICE = b"\nstopping after this step; the same again stops at once, without saving\n"


class Interrupts:
    """`with Interrupts() as interrupts:` … `if interrupts.requested: save and leave`.

    Outside the main thread, where Python handles no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        with contextlib.suppress(OSError):  # standard error may be closed
            os.write(2, NOTICE)  # not print: it may be what this signal interrupted
