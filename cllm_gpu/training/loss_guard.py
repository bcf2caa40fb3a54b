"""Whether a step's gradient may reach the weights: never a non-finite one, and, when asked for, no spike.

Spike: a loss or gradient norm more than `spike_deviations` standard deviations above the mean of the last
`spike_window` accepted steps. A spike does not enter the window, so it cannot hide the next one; a lasting change of
level is therefore skipped every time and ends the run by `maximum_skipped`, with a line that says so.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from cllm_gpu.utils.errors import UserError

LEAST_DEVIATION = 1e-2
"""A window's standard deviation counts as at least this share of its mean: on a plateau noise is not a spike."""


class LossGuard:
    """Judges every step, counts those it turns away. Its whole state is in `as_dict` and belongs to the checkpoint."""

    def __init__(self, *, maximum_skipped: int, spike_window: int, spike_deviations: float) -> None:
        """`maximum_skipped` in a row end the run (at least 1); `spike_window` in steps, 0: watch for no spike."""
        self.maximum_skipped = maximum_skipped
        self.spike_window = spike_window
        self.spike_deviations = spike_deviations
        self.skipped = 0
        """Steps turned away in all."""
        self.skipped_in_a_row = 0
        self._reason = ""
        self._losses: deque[float] = deque(maxlen=spike_window)
        self._gradient_norms: deque[float] = deque(maxlen=spike_window)

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """None if the step may be applied, else one line that says why not. Call `count` with the outcome."""
        if not math.isfinite(loss):
            return f"non-finite loss ({loss})"
        if not math.isfinite(gradient_norm):
            return f"non-finite gradient norm ({gradient_norm})"
        return self._spike("loss", loss, self._losses) or self._spike(
            "gradient norm", gradient_norm, self._gradient_norms
        )

    def count(self, reason: str | None, loss: float, gradient_norm: float) -> None:
        """A step was applied (None) or skipped for `reason`: by `judge`, or by an optimizer that did not apply it."""
        if reason is None:
            self.skipped_in_a_row = 0
            self._losses.append(float(loss))
            self._gradient_norms.append(float(gradient_norm))
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._reason = reason

    def check(self) -> None:
        """Raises UserError once `maximum_skipped` steps in a row have been turned away."""
        if self.skipped_in_a_row >= self.maximum_skipped:
            count = self.skipped_in_a_row
            raise UserError(
                f"training stopped: {count} {'step' if count == 1 else 'steps in a row'} skipped, the last because of "
                f"a {self._reason}; the weights are those of the last good step; {self._advice()}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The state as plain data; JSON keeps it exactly (all floats are finite)."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "reason": self._reason,
            "losses": list(self._losses),
            "gradient_norms": list(self._gradient_norms),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take on a state that `as_dict` gave; with a smaller window now its newest entries are kept."""
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])
        self._reason = str(state["reason"])
        self._losses = deque(map(float, state["losses"]), maxlen=self.spike_window)
        self._gradient_norms = deque(map(float, state["gradient_norms"]), maxlen=self.spike_window)

    def _spike(self, what: str, value: float, window: deque[float]) -> str | None:
        """One line when `value` stands out of a full window, else None."""
        if self.spike_window == 0 or len(window) < self.spike_window:
            return None
        mean = math.fsum(window) / len(window)  # fsum: exact, so the same whatever the order or the platform
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
        deviation = max(deviation, LEAST_DEVIATION * abs(mean))
        if value <= mean + self.spike_deviations * deviation:
            return None
        return (
            f"spike of the {what}: {value:.4g}, more than {self.spike_deviations:g} deviations of {deviation:.3g} "
            f"above the mean {mean:.4g} of {len(window)} steps"
        )

    def _advice(self) -> str:
        if self._reason.startswith("spike"):
            return "raise training.spike_deviations, set training.spike_window = 0, or lower optimizer.rate"
        return "lower optimizer.rate, lengthen schedule.warmup_steps or set optimizer.clip_norm"
