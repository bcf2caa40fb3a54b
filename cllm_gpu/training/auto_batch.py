"""The largest batch for which the device has memory, by the plan; and what would fit where a plan does not.

`auto` becomes a number before a run begins, and the run keeps the number: what resumes or repeats it takes the same.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from cllm_gpu.backend import Backend
from cllm_gpu.config import Config
from cllm_gpu.model.architecture import SIZES, Architecture
from cllm_gpu.model.recompute import LEVELS, Recompute
from cllm_gpu.training.memory_plan import MemoryPlan, plan_memory
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import readable_size

CPU_SEQUENCES = 8
"""Sequences for each worker beyond which a batch is not made larger on a CPU: its steps would take longer, and hardly
more tokens a second (bench/training/recompute.py)."""
NO_MEMORY = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the errors of CUDA's libraries begin with that are about memory; those of CuPy's arrays are MemoryErrors."""


@dataclasses.dataclass(frozen=True)
class BatchSizeFinder:
    """Plans of one run for a device with `free` bytes of memory, of which a share stays in reserve."""

    config: Config
    architecture: Architecture
    backend: Backend
    free: int

    @property
    def room(self) -> int:
        """Bytes a plan may take."""
        return int(self.free * (1.0 - self.backend.memory_reserved))

    def size(self, sequences: int, level: Recompute | None = None) -> int:
        """Bytes of the plan with so many sequences at a time, at a recompute level (None: the configured one).

        They are the batch where that is auto, else its micro-batches.
        """
        loop = self.config.training
        changes: dict[str, Any] = {"recompute": level or loop.recompute, "diagnose_every": 0}
        changes |= {"batch": sequences, "micro_batch": None} if loop.batch == "auto" else {"micro_batch": sequences}
        config = dataclasses.replace(self.config, training=dataclasses.replace(loop, **changes))
        return plan_memory(config, self.architecture, self.backend).total

    def largest(self, sizes: Sequence[int], level: Recompute | None = None) -> int | None:
        """The largest of ascending `sizes` whose plan fits; None if none does."""
        if self.size(sizes[-1], level) <= self.room:  # a batch may take less than its half, whose gradients are wider
            return sizes[-1]
        count = bisect.bisect_left(sizes, True, key=lambda size: self.size(size, level) > self.room)
        return sizes[count - 1] if count else None

    @property
    def spoken(self) -> str:
        """The memory there is, in words."""
        return f"{readable_size(self.free)} of free memory, {self.backend.memory_reserved:.0%} of it in reserve"


def decide_batch(
    config: Config, architecture: Architecture, backend: Backend, windows: int
) -> tuple[Config, str | None]:
    """The configuration with a number for each `auto`, and a line that says which and why, None without any `auto`.

    `windows`: sequences of the training text. A batch is a power of two or a multiple of 8. UserError where not even
    one sequence fits, or the system does not say what memory is free.
    """
    loop = config.training
    if loop.batch == "auto":
        windows = max(1, windows)  # of a text too short for one, the batches say so
        most = windows if backend.is_card else min(windows, CPU_SEQUENCES * backend.workers)
        sizes = [size for size in (1, 2, 4) if size <= most] + list(range(8, most + 1, 8))
        all_of_them = "the training text has no more sequences"
        if most < windows:
            all_of_them = f"{CPU_SEQUENCES} for each worker, as on a CPU more are hardly faster"
        chosen, finder = _decide(config, architecture, backend, sizes)
        what, loop = f"batch {chosen}", dataclasses.replace(loop, batch=chosen)
    elif loop.micro_batch == "auto":
        sizes, all_of_them = divisors(loop.sequences), "all of it fits"
        chosen, finder = _decide(config, architecture, backend, sizes)
        what, loop = f"micro-batch {chosen} of batch {loop.batch}", dataclasses.replace(loop, micro_batch=chosen)
    else:
        return config, None
    reason = all_of_them if chosen == sizes[-1] else f"the largest that fits {finder.spoken}"
    plan = readable_size(finder.size(chosen))
    return dataclasses.replace(config, training=loop), f"{what}: {reason} (plan {plan}, recompute {loop.recompute})"


def _decide(
    config: Config, architecture: Architecture, backend: Backend, sizes: list[int]
) -> tuple[int, BatchSizeFinder]:
    free = backend.memory_free()
    if free is None:
        raise UserError("this system does not say how much memory is free: auto cannot be decided, give a number")
    finder = BatchSizeFinder(config, architecture, backend, free)
    chosen = finder.largest(sizes)
    if chosen is None:
        least = readable_size(finder.size(1))
        raise UserError(
            f"not even one sequence fits {finder.spoken}: the plan of one takes {least} with recompute "
            f"{config.training.recompute}; {_would_fit(finder, 1)}"
        )
    return chosen, finder


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def memory_shortage(config: Config, architecture: Architecture, backend: Backend, plan: MemoryPlan) -> str | None:
    """One line with what would fit if the plan takes more memory than is free; None if it fits or this is unknown."""
    free = backend.memory_free()
    if free is None or plan.total <= free:
        return None
    finder = BatchSizeFinder(config, architecture, backend, free)
    return (
        f"the plan takes {readable_size(plan.total)}, and {readable_size(free)} of memory are free: "
        f"{_would_fit(finder, config.training.at_once)}"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is that there was no memory, on the host or on a card."""
    return isinstance(error, MemoryError) or str(error).startswith(NO_MEMORY)


def out_of_memory(
    config: Config, architecture: Architecture, backend: Backend, plan: MemoryPlan, free: int | None, error: Exception
) -> str:
    """The line for a run that found no memory; `free`: what there was before it began."""
    said = str(error).strip().partition("\n")[0]
    cause, there = f" ({said})" if said else "", "" if free is None else f", {readable_size(free)} were free"
    room = plan.total * 0.9  # where the plan seemed to fit, what takes a tenth less may
    room = room if free is None else min(room, free * (1.0 - backend.memory_reserved))
    finder = BatchSizeFinder(config, architecture, backend, int(room / (1.0 - backend.memory_reserved)))
    smaller = what_fits(finder, config.training.at_once)
    return (
        f"out of memory{cause}: the plan takes {readable_size(plan.total)} with recompute {plan.recompute}{there}; "
        f"{'a smaller model may fit' if smaller is None else f'try {smaller}'}"
    )


def _would_fit(finder: BatchSizeFinder, sequences: int) -> str:
    found = what_fits(finder, sequences)
    return "no smaller model would fit either" if found is None else f"{found} would fit"


def what_fits(finder: BatchSizeFinder, sequences: int) -> str | None:
    """What fits, in words: fewer of so many sequences at a time, other recompute levels; else a smaller model."""
    found, most, configured = [], 0, finder.config.training.recompute
    for level in LEVELS[LEVELS.index(configured) :]:
        size = finder.largest(divisors(sequences), level)
        if size is None or size <= most:
            continue
        most = size
        names = [f"training.recompute {level}"] if level != configured else []
        names += [f"training.micro_batch {size}"] if size < sequences else []
        found.append(f"{' with '.join(names)} ({readable_size(finder.size(size, level))})")
    return " or ".join(found) if found else next(_smaller(finder), None)


def _smaller(finder: BatchSizeFinder) -> Iterator[str]:
    """Models that fit one sequence at a time, with everything computed again: shorter contexts, then named sizes."""
    a = finder.architecture
    contexts = [a.context >> power for power in range(1, a.context.bit_length())]
    shapes: list[tuple[str, dict[str, Any]]] = [(f"model.context {n}", {"context": n}) for n in contexts]
    for name, size in reversed(SIZES.items()):
        shapes.append((f"model.size {name}", size | {"kv_heads": size["heads"], "mlp_width": 4 * size["width"]}))
    for name, shape in shapes:
        smaller = dataclasses.replace(finder, architecture=dataclasses.replace(a, **shape))
        if smaller.largest([1], LEVELS[-1]) is not None:
            yield f"{name} with training.recompute {LEVELS[-1]}, one sequence at a time,"
