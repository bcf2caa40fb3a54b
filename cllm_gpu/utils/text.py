"""Text for a terminal."""

from __future__ import annotations

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 and C1 controls but tab and newline, other line ends, what reverses the direction of writing, and surrogates."""


def visible(text: str) -> str:
    r"""`text` as a terminal may receive it: control characters, which an untrained model also picks, are escaped.

    Escape becomes the four characters `\x1b`; newlines and tabs stay.
    """
    return _UNSAFE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
