"""Named ranges for a profiler (NVTX), in the domain `cllm_gpu`.

With no profiler attached a range costs a dictionary look-up and two empty calls. Where the `nvtx` package has no wheel
(macOS) ranges do nothing. Whoever wants to time kernels without a profiler watches the ranges instead
(`Ranges.watch`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

DOMAIN = "cllm_gpu"
KERNEL = "kernel/"
"""Begins the names of ranges that hold one launch; only a watch sees them, since a profiler sees kernels by itself."""
MATMUL = "matmul"
"""The launch of a matrix product by a library."""
Watch = Callable[[str], AbstractContextManager[None]]
"""What to enter for the range of a name."""


def _nvtx_domain() -> Any | None:
    try:
        import nvtx
    except ImportError:
        return None
    return nvtx.get_domain(DOMAIN)


class _Range:
    """One named range, entered and left any number of times, also nested."""

    __slots__ = ("_attributes", "_domain")

    def __init__(self, domain: Any, name: str) -> None:
        self._domain = domain
        self._attributes = domain.get_event_attributes(message=name)

    def __enter__(self) -> None:
        self._domain.push_range(self._attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._domain.pop_range()


class _NoRange:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_NONE = _NoRange()


def unwatched(name: str) -> AbstractContextManager[None]:
    """The range of a launch without a profiler."""
    return _NONE


class Ranges:
    """`with ranges("forward/block_03/attention"): …`; each name's attributes are made once."""

    def __init__(self, domain: Any | None = None) -> None:
        self._domain = _nvtx_domain() if domain is None else domain
        self._known: dict[str, _Range] = {}
        self.watch: Watch | None = None
        """Takes the profiler's place: called at each range, and at each launch of a kernel."""

    def kernel(self, name: str) -> AbstractContextManager[None]:
        """The range around one launch of the kernel `name`, or of a matrix product (MATMUL)."""
        return _NONE if self.watch is None else self.watch(KERNEL + name)

    def __call__(self, name: str) -> AbstractContextManager[None]:
        if self.watch is not None:
            return self.watch(name)
        if self._domain is None:
            return _NONE
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = _Range(self._domain, name)
        return found
