"""Parameter groups: which parameters are updated by which rule, at which learning rate, with weight decay or without.

A group is a predicate on parameters with its options, as a group of `torch.optim`. Where its parameters lie in the flat
arrays follows from the layout: neighbours that one call of an update rule can step become one segment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cllm_gpu.config import OptimizerConfig
from cllm_gpu.model.parameters import Layout, ParameterSpec


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with options of their own."""

    contains: Callable[[ParameterSpec], bool]
    rule: str
    """Name of the update rule, a key of `optimizer.RULES`."""
    rate_multiple: float = 1.0
    """Learning rate, as a multiple of the configured one."""
    weight_decay: bool = False
    """Whether the configured weight decay applies."""


def parameter_groups(config: OptimizerConfig) -> tuple[ParameterGroup, ...]:
    """The groups of a run: the lattice's scalars, the matrices, the rest. A parameter is in the first that fits."""
    return (
        ParameterGroup(lambda spec: spec.scalars, config.name, rate_multiple=config.lattice_rate),
        ParameterGroup(lambda spec: spec.decayed, config.name, weight_decay=True),
        ParameterGroup(lambda spec: True, config.name),
    )


@dataclass(frozen=True)
class Segment:
    """A contiguous part of the flat arrays, stepped by one call of an update rule."""

    part: slice
    rule: str
    rate_multiple: float
    decayed: int
    """Elements of its prefix that weight decay applies to."""


def segments(layout: Layout, groups: Sequence[ParameterGroup]) -> tuple[Segment, ...]:
    """The fewest segments that cover the layout, in its order. ValueError for a parameter that is in no group."""
    found: list[Segment] = []
    places = pairwise([*layout.offsets.values(), layout.size])
    for spec, (start, stop) in zip(layout.specs.values(), places, strict=True):
        group = _group_of(spec, groups)
        decayed = stop - start if group.weight_decay else 0
        if found and _continues(found[-1], group):
            last = found[-1]
            found[-1] = dataclasses.replace(last, part=slice(last.part.start, stop), decayed=last.decayed + decayed)
        else:
            found.append(Segment(slice(start, stop), group.rule, group.rate_multiple, decayed))
    return tuple(found)


def _group_of(spec: ParameterSpec, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    for group in groups:
        if group.contains(spec):
            return group
    raise ValueError(f"parameter {spec.name} is in no parameter group")


def _continues(segment: Segment, group: ParameterGroup) -> bool:
    """Whether the group's parameters, right behind the segment, can be stepped in the same call."""
    same = (segment.rule, segment.rate_multiple) == (group.rule, group.rate_multiple)
    return same and (not group.weight_decay or segment.decayed == segment.part.stop - segment.part.start)
