"""Gradient check: the hand-written backward of a whole model against numerical differences of its loss, in float64.

For each named parameter w and unit directions d on it, the analytic g·d is compared with the five-point difference

    f'(0) ≈ [8·(f(h) − f(−h)) − (f(2h) − f(−2h))] / (12·h),   f(s) = loss(w + s·d)

whose truncation is h⁴·f⁽⁵⁾/30 (Abramowitz & Stegun, 25.3.6). d is the sum of a random unit vector, which sees an error
in any element, and the gradient's own unit vector, which keeps f' from being zero by chance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm_gpu.backend import Backend
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import ParameterSpec
from cllm_gpu.model.parameters import FlatParameters, Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.reference.cross_entropy import IGNORE_INDEX
from cllm_gpu.ops.reference.dropout import Dropout
from cllm_gpu.utils.errors import UserError

STEPS = (1e-3, 1e-4, 1e-5)
"""h. At the first, truncation, 3e-14 times a fifth derivative, and rounding, eps·loss/h = 1e-12, are alike in size for
ordinary models. The next is tried where one fails: layer norm over very few elements can bend sharply."""
BOUND = 1e-7
"""Largest relative error. Rounding leaves about 1e-12 to 1e-11 over |g|, and |g| of a group is above 1e-3 at these
weights; a wrong backward is wrong by far more than 1e-7 of its group."""
SPREAD = 0.3
"""Deviation of biases from 0 and of norm weights from 1 at the point where gradients are checked."""


@dataclass(frozen=True)
class GroupCheck:
    """One parameter's worst direction."""

    name: str
    size: int
    analytic: float
    numerical: float
    relative_error: float
    """|analytic − numerical| / max of both; 0 when both are below what the difference can resolve."""
    bound: float
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def check_gradients(
    architecture: Architecture,
    backend: Backend,
    *,
    batch: int = 2,
    length: int | None = None,
    seed: int = 1,
    directions: int = 2,
    bound: float = BOUND,
) -> list[GroupCheck]:
    """A check of every named parameter of `architecture`, dropout included where it has it, on random tokens (B, T).

    `length` None: the context, but at most 16. UserError for sizes that cannot be.
    """
    return list(iterate_checks(architecture, backend, batch, length, seed, directions, bound))


def iterate_checks(
    architecture: Architecture,
    backend: Backend,
    batch: int = 2,
    length: int | None = None,
    seed: int = 1,
    directions: int = 2,
    bound: float = BOUND,
) -> Iterator[GroupCheck]:
    """The checks of `check_gradients` one by one, for progress."""
    length = min(architecture.context, 16) if length is None else length
    if batch < 1 or directions < 1:
        raise UserError(f"a gradient check needs a batch and directions of at least 1, not {batch} and {directions}")
    if not 1 <= length <= architecture.context:
        raise UserError(f"length {length} does not lie between 1 and the model's context {architecture.context}")
    problem = _Problem(architecture, backend, batch, length, seed)
    gradients = problem.gradients()
    generator = _generator(seed, "directions")
    for name in problem.parameters:
        yield problem.check(name, gradients[name], generator, directions, bound)


def random_point(layout: Layout, seed: int) -> npt.NDArray[np.float64]:
    """Flat parameters (size,) at which every gradient is of ordinary size.

    At the usual start attention is nearly uniform and biases are zero, so a wrong term can hide. Here matrices have
    deviation 1/√columns, which keeps activations near 1, and biases and norm weights are off their start.
    """
    flat = np.zeros(layout.size, dtype=np.float64)
    for name, spec in layout.specs.items():
        offset = layout.offsets[name]
        values = _generator(seed, name).standard_normal(spec.shape) * _deviation(spec) + spec.starting_values()
        flat[offset : offset + spec.size] = values.reshape(-1)
    return flat


def _deviation(spec: ParameterSpec) -> float:
    return 1.0 / math.sqrt(spec.shape[-1]) if spec.decayed else SPREAD


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"gradient check/{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


class _Problem:
    """A model at a random point, tokens, targets and a dropout mask: everything the loss depends on."""

    def __init__(self, a: Architecture, backend: Backend, batch: int, length: int, seed: int) -> None:
        self.backend = backend
        self.layout = Layout(parameter_specs(a), np.float64)
        self.parameters = self.layout.views(backend.zeros(self.layout.size, np.float64))
        self.parameters.flat[...] = backend.asarray(random_point(self.layout, seed))
        self.model = Transformer(a, backend, self.parameters)
        self.activations = Activations(a, backend, batch, length, np.float64, training=True)
        generator = _generator(seed, "tokens")
        tokens, targets = generator.integers(0, a.vocabulary, (2, batch, length)).astype(np.int32)
        if targets.size > 2:  # targets that do not count are part of what is checked
            targets.reshape(-1)[targets.size // 2] = IGNORE_INDEX
        self.tokens, self.targets = backend.asarray(tokens), backend.asarray(targets)
        self.scale = 1.0 / int(np.count_nonzero(targets != IGNORE_INDEX))
        self.dropout = Dropout(a.dropout, seed, step=0, site=0) if a.dropout else None
        self._scratch = self._new_gradients()

    def _new_gradients(self) -> FlatParameters:
        return self.layout.views(self.backend.zeros(self.layout.size, np.float64))

    def gradients(self) -> FlatParameters:
        """Analytic gradients of the mean loss."""
        gradients = self._new_gradients()
        self._loss_into(gradients)
        return gradients

    def loss(self) -> float:
        """Mean loss; the model's forward with dropout comes only together with its backward."""
        if self.dropout is not None:
            return self._loss_into(self._scratch)
        losses, _ = self.model.losses(self.activations, self.tokens, self.targets)
        return float(losses.sum()) * self.scale

    def _loss_into(self, gradients: FlatParameters) -> float:
        total = self.model.loss_and_gradients(
            self.activations,
            self.tokens,
            self.targets,
            gradients,
            gradient_scale=self.scale,
            accumulate=False,
            dropout=self.dropout,
        )
        return total * self.scale

    def check(
        self, name: str, gradient: Any, generator: np.random.Generator, directions: int, bound: float
    ) -> GroupCheck:
        """The worst of `directions` comparisons for one parameter."""
        g = self.backend.to_host(gradient).copy()
        worst = (0.0, 0.0, -1.0)
        for _ in range(directions):
            d = _direction(g, generator)
            analytic = float((g * d).sum())
            for step in STEPS:
                numerical, resolution = self._difference(name, d, step)
                error = relative_error(analytic, numerical, resolution)
                if error <= bound:
                    break
            if not (error <= worst[2]):  # a NaN is the worst there is
                worst = (analytic, numerical, error)
            if math.isnan(error):
                break
        return GroupCheck(name, g.size, *worst, bound=bound, passed=worst[2] <= bound)

    def _difference(self, name: str, direction: npt.NDArray[np.float64], step: float) -> tuple[float, float]:
        """The five-point difference along `direction`, and how small a derivative it can resolve."""
        w, d = self.parameters[name], self.backend.asarray(direction)
        start = w.copy()
        values = {}
        for multiple in (-2, -1, 1, 2):
            w[...] = start + (multiple * step) * d
            values[multiple] = self.loss()
        w[...] = start
        derivative = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step)
        resolution = 8 * np.finfo(np.float64).eps * max(abs(value) for value in values.values()) / step
        return derivative, float(resolution)


def _direction(gradient: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Unit vector: a random one plus the gradient's, unless that is zero."""
    random = generator.standard_normal(gradient.shape)
    direction = random / np.linalg.norm(random)
    norm = np.linalg.norm(gradient)
    if np.isfinite(norm) and norm > 0:
        # never against each other, or the sum would be nearly nothing
        sign = 1.0 if float((direction * gradient).sum()) >= 0 else -1.0
        direction += sign * gradient / norm
    return direction / np.linalg.norm(direction)


def relative_error(analytic: float, numerical: float, resolution: float) -> float:
    """|analytic − numerical| / max(|analytic|, |numerical|); 0 where both are at most `resolution`; NaN for NaN."""
    largest = max(abs(analytic), abs(numerical))
    if largest <= resolution:
        return 0.0
    return abs(analytic - numerical) / largest
