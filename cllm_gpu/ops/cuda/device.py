"""The operations of asynchronous training steps, bound to a launcher."""

from __future__ import annotations

import functools

from cllm_gpu.ops.cuda.adam import adam_step_on_device
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.sgd import sgd_step_on_device
from cllm_gpu.ops.cuda.squared_norm import squared_norm_on_device
from cllm_gpu.ops.cuda.step_decision import add_losses, decide_step
from cllm_gpu.ops.stream import Device, Stream


def cuda_device(launcher: Launcher, stream: Stream, replays: str) -> Device:
    """These operations launching through `launcher` into `stream`. replays: as `Device.replays`."""
    return Device(
        stream,
        replays,
        add_losses=functools.partial(add_losses, launcher),
        decide_step=functools.partial(decide_step, launcher),
        squared_norm=functools.partial(squared_norm_on_device, launcher),
        adam_step=functools.partial(adam_step_on_device, launcher),
        sgd_step=functools.partial(sgd_step_on_device, launcher),
    )
