"""The one exception a user can cause.

Everything that bad input, a bad file or a missing tool can bring about is a `UserError` whose text is one line:
what is wrong, where, and what would be right. The command line prints that line and exits with status 2.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or environment. `str(error)` is one line that says what is wrong, where, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
