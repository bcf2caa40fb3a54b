"""What the host tells a device for each step: copied while the step before runs, by a stream of its own.

A captured step reads its inputs from one array, whose address the graph holds. While a step reads it, the copy from the
host goes to a second array, beside the step; a copy within the device, in order with the steps, then brings it to the
first. Each of the two streams waits for the other where it must: the steps for what was sent, the sending for what was
taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.stream import Mark, Stream


class Inlet:
    """The way of a pinned host array to `inputs`, an array of the device that the work of `stream` reads."""

    def __init__(self, stream: Stream, staging: Any, inputs: Any) -> None:
        """staging: of the size and dtype of `inputs`, on the device; for this inlet alone."""
        self._stream, self._copies = stream, stream.another()
        self._staging, self._inputs = staging, inputs
        self._taken: Mark | None = None

    def send(self, host: np.ndarray[Any, Any]) -> None:
        """Enqueue the copy of `host`, which must not change before work that is enqueued after this is done."""
        if self._taken is not None:
            self._copies.follow(self._taken)
        self._copies.upload(host, self._staging)
        self._stream.follow(self._copies.mark())
        self._stream.copy(self._staging, self._inputs)
        self._taken = self._stream.mark()
