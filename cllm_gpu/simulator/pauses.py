"""Pauses the running launch several times a second: a kernel that runs in C++ leaves Python no turn by itself."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

INTERVAL = 0.05
"""Seconds between two pauses."""
_IDLE = 5.0
"""Seconds without a launch after which the thread ends."""

_lock = threading.Lock()
_launching: int | None = None
"""The thread that runs a launch."""
_last_launch = 0.0
_watcher: threading.Thread | None = None


@contextlib.contextmanager
def paused_regularly() -> Iterator[None]:
    """Send the current thread SIGURG at INTERVAL, which pauses a launch. Without a handler the signal is ignored."""
    global _launching, _last_launch
    with _lock:
        _launching, _last_launch = threading.get_ident(), time.monotonic()
        _start_watcher()
    try:
        yield
    finally:
        with _lock:
            _launching = None


def _start_watcher() -> None:
    """Start the thread that sends the signals, unless it runs; after a fork the child has none."""
    global _watcher
    if _watcher is None or not _watcher.is_alive():
        _watcher = threading.Thread(target=_watch, name="simulator pauses", daemon=True)
        with contextlib.suppress(RuntimeError):  # at the interpreter's end no thread can start
            _watcher.start()


def _watch() -> None:
    global _watcher
    while True:
        time.sleep(INTERVAL)
        with _lock:
            idle = time.monotonic() - _last_launch
            if _launching is None and idle > _IDLE:
                _watcher = None
                return
            if _launching is not None and idle > INTERVAL / 2:
                signal.pthread_kill(_launching, signal.SIGURG)
