"""Bounds on what an update can reach, known before it is applied: so one that could overflow is never applied.

With norms of the weights W, of a rule's first moment or velocity M, and of the scaled gradient G, triangle inequalities
bound everything a step computes; W grows at most by the norm of what was subtracted. No pass over the parameters is
needed, and in any sensible run the bounds are far below what the dtype holds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """How far one step of an update rule can go: M' = carry·M + gain·(G + coupled_decay·W) and
    |update| ≤ rate·(M'·amplification/(1 − correction_beta^t) + decoupled_decay·W)."""

    moment: str | None
    """Name of the state that M is the norm of; None without."""
    carry: float
    gain: float
    amplification: float = 1.0
    """The most that an element of the moment is multiplied by, learning rate and bias correction aside."""
    correction_beta: float = 0.0
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0

    def moment_after(self, moment: float, gradient: float, weights: float) -> float:
        """Bound on M after a step with a scaled gradient of norm `gradient`."""
        return self.carry * moment + self.gain * (gradient + self.coupled_decay * weights)

    def is_finite(
        self, *, rate: float, step: int, gradient: float, weights: float, moment: float, largest: float
    ) -> bool:
        """Whether everything that step number `step` (from 1) computes stays below `largest`, for certain.

        gradient: norm of the scaled gradient. weights, moment: W and M before the step. False if any of them is NaN.
        """
        if self.coupled_decay and not (gradient + self.coupled_decay * weights) ** 2 < largest:
            return False  # what is squared is the gradient with the decay in it
        after = self.moment_after(moment, gradient, weights)
        step_size = rate / (1.0 - self.correction_beta**step)
        reached = weights + step_size * (after * self.amplification) + rate * self.decoupled_decay * weights
        return step_size < largest and after * self.amplification < largest and reached < largest
