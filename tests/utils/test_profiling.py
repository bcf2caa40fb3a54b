"""Ranges with the real library where it is installed, and without it."""

from __future__ import annotations

import sys

import pytest

from cllm_gpu.utils.profiling import DOMAIN, Ranges


def test_the_real_library_takes_our_ranges() -> None:
    nvtx = pytest.importorskip("nvtx", reason="nvtx has no wheel for this system")
    ranges = Ranges(nvtx.get_domain(DOMAIN))
    with ranges("forward"), ranges("forward/block_00/attention"), ranges("forward"):
        pass
    assert ranges("forward") is ranges("forward")  # attributes are made once


def test_without_the_library_ranges_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)  # import fails
    ranges = Ranges()
    with ranges("forward"):
        pass
    assert ranges("forward") is ranges("backward")


def test_an_error_inside_leaves_the_range() -> None:
    events: list[str] = []

    class Domain:
        def get_event_attributes(self, *, message: str) -> str:
            return message

        def push_range(self, name: str) -> None:
            events.append(f"+{name}")

        def pop_range(self) -> None:
            events.append("-")

    def fail() -> None:
        with Ranges(Domain())("data"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert events == ["+data", "-"]
