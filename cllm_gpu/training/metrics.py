"""What happened in a run, one JSON object per line, for people and programs to read while it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm_gpu.utils import exact_json
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, sync_folder, write_atomically


class MetricsLog:
    """Appends records to a file of JSON lines. Each line reaches the file before `append` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. Raises UserError when the disk is full or the file cannot be written."""
        line = exact_json.dumps(record).encode() + b"\n"
        with clear_errors("write", self.path, len(line)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(line)

    def sync(self) -> None:
        """Make what was appended survive a power failure; called before a checkpoint is written."""
        with clear_errors("write", self.path):
            if self.path.exists():
                with open(self.path, "ab") as file:
                    os.fsync(file.fileno())
                sync_folder(self.path.parent)

    def truncate_after(self, step: int) -> None:
        """Drop records whose "step" is greater than `step`, and a last line that an interruption tore.

        Kept lines keep their bytes, so a run that resumes ends with the file of a run that was never stopped.
        """
        if not self.path.exists():
            return
        kept = [line for line, record in _lines(self.path) if record.get("step", step) <= step]
        content = b"".join(kept)
        if len(content) != self.path.stat().st_size:
            write_atomically(self.path, content)


def clipped(record: dict[str, Any], clip_norm: float) -> bool:
    """Whether the step of a record was taken with a gradient scaled down to `clip_norm` (0: clipping is off)."""
    return record["skipped"] is None and 0 < clip_norm < record["gradient_norm"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records, in order; a torn last line is left out. Raises UserError when the file is missing or damaged."""
    return [record for _, record in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line with its record."""
    with clear_errors("read", path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # an interrupted write; only the last line can lack its end
            try:
                record = exact_json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}, line {number} is not a JSON object: it is damaged, or not the metrics of a run"
                )
            yield line, record
