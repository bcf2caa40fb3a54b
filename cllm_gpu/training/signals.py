"""Signals that ask long work to stop: the first request is noted and answered, a second Ctrl-C interrupts at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
"""Ctrl-C, termination, a lost terminal, Ctrl-\\, and what batch systems send before their limits."""
KEYS = ("SIGINT", "SIGQUIT")
"""Those of a person at a terminal, who may insist; the others are repeated by systems that only repeat themselves."""
ONE_PRESS = 0.3
"""Seconds; a key's signal that comes again sooner is the same press, which a launcher passed on as well."""
NOTICE = "\nstopping after this step; the same again stops at once, without saving\n"
SYSTEM_NOTICE = "\n{name}: saving and stopping after this step\n"


class Stopped(KeyboardInterrupt):
    """Work that keeps nothing was stopped by the signal of this number; None if it was not a signal."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number


class Interrupts:
    """`with Interrupts() as interrupts:` … `if interrupts.requested: save and leave`.

    A signal that the process was started to ignore (nohup) stays ignored. Outside the main thread, where Python
    handles no signals, nothing is caught.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that came; None if none did."""
        self._first = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)  # Windows has but two of them
                if number is None or (name != "SIGINT" and signal.getsignal(number) is signal.SIG_IGN):
                    continue  # shells start background jobs with SIGINT ignored, unasked: it is heard all the same
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.number is not None:
            if name in KEYS and time.monotonic() - self._first >= ONE_PRESS:
                raise Stopped(number)
            return
        self.number, self._first = number, time.monotonic()
        notice = NOTICE if name in KEYS else SYSTEM_NOTICE.format(name=name)
        with contextlib.suppress(OSError):  # standard error may be closed
            os.write(2, notice.encode())  # not print: it may be what this signal interrupted
