"""The copy of a step's inputs to a device, while the step before runs, by a stream of its own.

A captured step reads its inputs from one array, whose address the graph holds. While a step reads it, the copy from the
host goes to a staging buffer, beside the step; a copy within the device, in order with the steps, then brings it to the
first. Each of the two streams waits for the other where it must: the steps for the upload, the next upload for the copy
out of the staging buffer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cllm_gpu.ops.stream import Event, Stream


class InputStaging:
    """Uploads pinned host arrays to `inputs`, an array of the device that the work of `stream` reads."""

    def __init__(self, stream: Stream, staging: Any, inputs: Any) -> None:
        """staging: of the size and dtype of `inputs`, on the device, used here alone."""
        self._stream, self._copies = stream, stream.another()
        self._staging, self._inputs = staging, inputs
        self._staging_free: Event | None = None

    def upload(self, host: np.ndarray[Any, Any]) -> None:
        """Enqueue the copy of `host`, which must not change before work that is enqueued after this is done."""
        if self._staging_free is not None:
            self._copies.wait_event(self._staging_free)
        self._copies.upload(host, self._staging)
        self._stream.wait_event(self._copies.record_event())
        self._stream.copy(self._staging, self._inputs)
        self._staging_free = self._stream.record_event()
