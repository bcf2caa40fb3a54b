"""Text for a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` for a terminal: control characters, which an untrained model also picks, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
