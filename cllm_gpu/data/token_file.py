"""Tokens of a file, read where they are wanted, with an error and no signal when the file is no longer what it was.

A mapped file that another process makes shorter ends this one by SIGBUS; a read of it is short, and can be told of.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import describe_error

MOST_OPEN = 256
"""Files kept open, which outlive their names; any more are opened for each read."""


class DataError(UserError):
    """Data that was sound when it was opened, and is not any more."""


class TokenFile:
    """`count` tokens of dtype, from byte `offset` of a file on.

    same:  called after the file was touched; whether its content is still what it was (None: it is taken not to be)
    """

    _open: ClassVar[int] = 0

    def __init__(
        self,
        path: Path,
        *,
        dtype: npt.DTypeLike,
        offset: int,
        count: int,
        same: Callable[[], bool] | None = None,
    ) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._offset, self._count, self._same = offset, count, same
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = path.open("rb", buffering=0)
        self._facts = _facts(self._file)
        if TokenFile._open < MOST_OPEN:
            TokenFile._open += 1
        else:
            self._file.close()
            self._file = None

    def __len__(self) -> int:
        return self._count

    def __del__(self) -> None:
        file: IO[bytes] | None = getattr(self, "_file", None)  # none yet if the file could not be opened
        if file is not None:
            file.close()
            TokenFile._open -= 1

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Tokens [start, stop), read now. DataError if the file was changed or cannot be read."""
        start, stop, step = part.indices(self._count)
        if step != 1:
            raise ValueError(f"tokens are read one after the other, not every {step}th")
        out = np.empty(max(0, stop - start), dtype=self.dtype)
        try:
            with self._lock:
                self._read(out.view(np.uint8).data, self._offset + start * self.dtype.itemsize)
        except OSError as error:
            raise DataError(describe_error(error, "read", self.path)) from error
        return out

    def _read(self, into: memoryview, position: int) -> None:
        file = self._file or self.path.open("rb", buffering=0)
        try:
            self._require_unchanged(file)
            file.seek(position)
            filled = 0
            while filled < len(into) and (read := file.readinto(into[filled:])):  # type: ignore[attr-defined]
                filled += read
            self._require_unchanged(file)
        finally:
            if file is not self._file:
                file.close()
        if filled < len(into):
            raise DataError(f"{self.path} ends too early: {len(into) - filled} bytes are missing at byte {position}")

    def _require_unchanged(self, file: IO[bytes]) -> None:
        facts = _facts(file)
        if facts == self._facts:
            return
        size, before = facts[0], self._facts[0]
        if size != before:
            raise DataError(f"{self.path} changed while it was in use: {before} bytes became {size}")
        if self._same is None or not self._same():
            raise DataError(f"{self.path} changed while it was in use: it was written to")
        self._facts = facts


def _facts(file: IO[bytes]) -> tuple[int, int]:
    """Size and time of change."""
    facts = os.fstat(file.fileno())
    return facts.st_size, facts.st_mtime_ns
