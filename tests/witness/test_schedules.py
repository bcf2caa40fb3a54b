"""Schedules against torch.optim.lr_scheduler's: LinearLR, CosineAnnealingLR, StepLR, SequentialLR."""

from __future__ import annotations

import pytest

from cllm_gpu.config import ScheduleConfig
from cllm_gpu.optim.schedules import rate_at

pytestmark = pytest.mark.witness

PEAK, STEPS, LOW = 0.3, 40, 0.03


def torch_rates(torch, schedule):
    """PyTorch's rates of STEPS steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = torch_schedule(torch, optimizer, schedule)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def torch_schedule(torch, optimizer, schedule):
    """The pieces one after the other: a LinearLR warmup, then PyTorch's own schedules, joined by SequentialLR."""
    kinds, warmup = torch.optim.lr_scheduler, schedule.warmup_steps
    decay = round(schedule.decay_fraction * STEPS)
    starts, pieces = [], []
    if warmup:
        starts.append(0)
        pieces.append(kinds.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1))
    starts.append(warmup)
    if schedule.name in ("constant", "wsd"):
        pieces.append(kinds.ConstantLR(optimizer, factor=1.0))
    if schedule.name == "wsd":
        starts.append(STEPS - decay)
        pieces.append(kinds.LinearLR(optimizer, 1.0, LOW / PEAK, total_iters=decay))
    if schedule.name == "linear":
        pieces.append(kinds.LinearLR(optimizer, 1.0, LOW / PEAK, total_iters=STEPS - warmup))
    if schedule.name == "cosine":
        pieces.append(kinds.CosineAnnealingLR(optimizer, T_max=STEPS - warmup, eta_min=LOW))
    if schedule.name == "step":
        pieces.append(kinds.StepLR(optimizer, schedule.step_every, schedule.step_factor))
    return kinds.SequentialLR(optimizer, pieces, milestones=starts[1:]) if starts[1:] else pieces[0]


@pytest.mark.parametrize("warmup", [0, 2, 7])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "step", "wsd"])
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step.*:UserWarning")
def test_every_rate(name, warmup, torch):
    """PyTorch multiplies its rates up step by step: about one rounding a step."""
    low = 0.0 if name in ("step", "constant") else LOW
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, minimum_rate=low, step_every=6, step_factor=0.7)
    ours = [rate_at(schedule, PEAK, STEPS, step) for step in range(STEPS)]
    assert ours == pytest.approx(torch_rates(torch, schedule), rel=STEPS * 2.2e-16 * 10)
