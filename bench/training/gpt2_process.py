"""One side of `bench.training.gpt2_training`, in a separate process: trains a model at one batch size, prints the
result.

    python -m bench.training.gpt2_process ours 124M 64

Both sides start from the same weights and get the same batches of random tokens, so their losses must agree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import Batches, Dataset
from cllm_gpu.data.tokens import TokenSource, compact_ids
from cllm_gpu.devices.energy import EnergyMeter, find_meter
from cllm_gpu.model.architecture import SIZES as NAMED
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.training.reporter import Reporter
from cllm_gpu.training.trainer import Trainer

Side = Literal["ours", "PyTorch"]
SIDES: tuple[Side, ...] = ("ours", "PyTorch")
SEED = 1
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
CHECKED = 20
"""First steps, which are not timed (compilation, autotuning, capture, warmup); their losses are compared."""
WINDOWS = 5
OUT_OF_MEMORY = "out of memory"
NOT_COMPILED = "not compiled"
"""Start of the note on PyTorch's side if torch.compile does not work; no target is evaluated against it then."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model, the batch sizes to try, and the length of a timed window."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    batches: tuple[int, ...]
    """Batch sizes in descending order."""
    window_tokens: int
    rate: float
    data_tokens: int = 1 << 22

    def architecture(self) -> Architecture:
        """Learned positions, tied head, biases, no dropout, standard attention."""
        return Architecture(
            vocabulary=self.vocabulary, context=self.context, layers=self.layers, heads=self.heads,
            kv_heads=self.heads, width=self.width, mlp_width=4 * self.width,
        )  # fmt: skip

    def window_steps(self, batch: int) -> int:
        """Number of steps in a timed window."""
        return max(2, self.window_tokens // (batch * self.context))


SIZES = {
    "10M": Size(256, batches=(4,), window_tokens=1 << 19, rate=1e-3, **NAMED["small"]),
    "124M": Size(50_304, batches=(64, 32, 16, 8), window_tokens=1 << 19, rate=3e-4, **NAMED["gpt2"]),
    "350M": Size(50_304, batches=(32, 16, 8, 4), window_tokens=1 << 18, rate=3e-4, **NAMED["gpt2-medium"]),
}
"""The size small on bytes at B=4, T=256, and the two smallest GPT-2 with the vocabulary padded to a multiple of 128."""
_TOY = Size(64, 16, 2, 2, 32, (4,), window_tokens=64, rate=3e-3, data_tokens=1 << 12)
REHEARSED = {"10M": _TOY, "124M": dataclasses.replace(_TOY, batches=(4, 2)), "350M": _TOY}


@dataclasses.dataclass(frozen=True)
class Run:
    """The measurements of one side."""

    losses: list[float]
    """Losses of the first CHECKED steps in nats."""
    seconds: list[float]
    """Seconds of each timed window."""
    held_bytes: int | None
    """Decrease of the GPU's free memory from start to end, including allocator reserves; None on a CPU."""
    description: str
    peak: tuple[float, str] | None = None
    """Peak FLOP/s of the GPU and their source; only on our side."""
    joules: float | None = None
    """Energy of all timed windows; None if the GPU has no energy counter."""
    note: str = ""
    """Reason why the figures are not valid for comparison; empty if they are."""


def random_tokens(size: Size, count: int, seed: int = SEED) -> TokenSource:
    """Random tokens with frequent small ids (V·u³, u uniform), so that the loss falls from the start."""
    uniform = np.random.default_rng(seed).random(count)
    ids = (size.vocabulary * uniform**3).astype(np.uint32)
    return TokenSource("random tokens", [compact_ids(ids, size.vocabulary)], vocabulary=size.vocabulary)


class Energy:
    """Energy consumption of the GPU between the first and the last reading."""

    def __init__(self, meter: EnergyMeter | None) -> None:
        self._meter = meter
        self._read: list[float | None] = []

    def read(self) -> None:
        """Read the counter. Call only at the start and end of the timed part: the counter is slower than a step."""
        self._read.append(None if self._meter is None else self._meter.joules())

    @property
    def joules(self) -> float | None:
        """The energy in joules; None if there is no counter or a reading failed."""
        known = [joules for joules in self._read if joules is not None]
        return known[-1] - known[0] if len(known) == len(self._read) > 1 else None


class _Clock:
    """A `reporter.Reporter` that records when each step finished, and the energy at the start and end of the timed
    steps."""

    def __init__(self, energy: Energy, last: int) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self._energy, self._ends = energy, (CHECKED, last)

    def step(self, record: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(record["loss"])
        if len(self.times) in self._ends:
            self._energy.read()

    def evaluation(self, record: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None:
        print(text, flush=True)


def windows(times: list[float], steps: int) -> list[float]:
    """Seconds of the windows of `steps` steps after the first CHECKED. times: when each step finished.

    >>> windows([float(t) for t in range(CHECKED + 2 * WINDOWS)], 2)
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    marks = times[CHECKED - 1 :: steps]
    return [after - before for before, after in itertools.pairwise(marks)][:WINDOWS]


def our_backend(*, rehearse: bool) -> Backend:
    """The backend of our side."""
    return get_backend("simulator" if rehearse else "cupy", precision="bf16")


def our_trainer(
    size: Size, batch: int, backend: Backend, reporter: Reporter, *, steps: int, capture: bool = True,
    checkpoint_every: int = 0,
) -> Trainer:  # fmt: skip
    """A trainer configured as `cllm-gpu train --precision bf16`, on random tokens, without output files."""
    config = Config(
        model=ModelConfig.of(size.architecture()),
        optimizer=OptimizerConfig(
            rate=size.rate, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY, clip_norm=CLIP
        ),
        schedule=ScheduleConfig(name="constant", warmup_steps=0),
        training=TrainingConfig(
            steps=steps, batch=batch, seed=SEED, evaluate_every=0, evaluation_batches=1,
            checkpoint_every=checkpoint_every, sample_tokens=0, capture=capture,
        ),
        backend=backend.name,
        precision="bf16",
    )  # fmt: skip
    validation = random_tokens(size, batch * (size.context + 1), seed=SEED + 1)
    dataset = Dataset(random_tokens(size, size.data_tokens), validation, None, size.vocabulary, None)
    return Trainer(config, backend, dataset, reporter=reporter)


def train_ours(size: Size, batch: int, *, rehearse: bool) -> Run:
    """Train our side: steps run ahead, captured and replayed."""
    before = None if rehearse else _free_for_cupy()
    backend, steps = our_backend(rehearse=rehearse), CHECKED + WINDOWS * size.window_steps(batch)
    energy = Energy(None if rehearse else find_meter())
    clock = _Clock(energy, steps)
    trainer = our_trainer(size, batch, backend, clock, steps=steps)
    try:
        trainer.initialise()
        trainer.train()
        held = None if before is None else before - _free_for_cupy()
    finally:
        trainer.close()
    peak = None if backend.peak is None else backend.peak()
    return Run(
        clock.losses[:CHECKED],
        windows(clock.times, size.window_steps(batch)),
        held,
        f"{backend.description}, {backend.products}",
        None if peak is None else (peak.flop_per_second, peak.source),
        joules=energy.joules,
    )


def _free_for_cupy() -> int:
    cupy = importlib.import_module("cupy")
    cupy.cuda.Device().synchronize()
    return int(cupy.cuda.runtime.memGetInfo()[0])


def train_torch(size: Size, batch: int, *, rehearse: bool) -> Run:
    """Train the PyTorch side, with the model of bench/training/nanogpt.py."""
    import torch

    from bench.training import nanogpt

    device = "cpu" if rehearse else "cuda"
    before = None if rehearse else torch.cuda.mem_get_info()[0]
    if not rehearse:  # a rehearsal does not change global settings
        torch.set_float32_matmul_precision("high")
    model = nanogpt.NanoGPT(size.architecture())
    layout = Layout(parameter_specs(size.architecture()), np.float32)
    nanogpt.load_weights(model, layout.views(initial_values(layout, SEED)))
    model.to(device)
    optimizer = nanogpt.fused_adamw(model, rate=size.rate, weight_decay=WEIGHT_DECAY, betas=BETAS)
    uncompiled = None if rehearse else compiler_trouble(torch)
    compiled = torch.compile(model, dynamic=False, disable=rehearse or uncompiled is not None)
    batches = Batches(random_tokens(size, size.data_tokens), batch=batch, context=size.context, seed=SEED)
    energy = Energy(None if rehearse else find_meter())
    loop = TorchLoop(torch, compiled, model, optimizer, batches, device, energy)
    with _one_thread(torch) if rehearse else contextlib.nullcontext():
        losses, times = loop.run(CHECKED, size.window_steps(batch))
    held = None if before is None else before - torch.cuda.mem_get_info()[0]
    seconds = [after - earlier for earlier, after in itertools.pairwise(times)]
    return Run(losses, seconds, held, f"PyTorch {torch.__version__}", joules=energy.joules, note=uncompiled or "")


def compiler_trouble(torch: Any) -> str | None:
    """Why torch.compile does not work (it needs Triton and a C compiler), in one line; None if it works."""
    try:
        torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(8, device="cuda"))
    except Exception as error:  # Triton, Inductor and the compiler each have their own exceptions
        lines = str(error).strip().splitlines()
        return f"{NOT_COMPILED}: {type(error).__name__}: {lines[0][:120] if lines else ''}"
    return None


@contextlib.contextmanager
def _one_thread(torch: Any) -> Iterator[None]:
    """Limit PyTorch to one thread: at toy sizes, synchronising several takes longer than the computation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchLoop:
    """Training loop like nanoGPT's: the next batch is copied during the computation, and the host never waits."""

    def __init__(
        self, torch: Any, compiled: Any, model: Any, optimizer: Any, batches: Batches, device: str, energy: Energy
    ) -> None:
        self._torch, self._compiled, self._model = torch, compiled, model
        self._optimizer, self._batches, self._device, self._energy = optimizer, batches, device, energy

    def run(self, checked: int, steps: int) -> tuple[list[float], list[float]]:
        """(losses of the first `checked` steps, times at their end and at the end of each window of `steps` steps)."""
        losses, times = [], []
        following = self._batch(0)
        for step in range(checked + WINDOWS * steps):
            tokens, targets = following
            loss, following = self._step(tokens, targets, step + 1)
            if step < checked:
                losses.append(loss)
            if step + 1 >= checked and (step + 1 - checked) % steps == 0:
                self._wait()
                times.append(time.perf_counter())
                if len(times) in (1, 1 + WINDOWS):
                    self._energy.read()
        return [float(loss.item()) for loss in losses], times

    def _step(self, tokens: Any, targets: Any, following: int) -> tuple[Any, tuple[Any, Any]]:
        attention = self._torch.nn.attention
        with (
            self._torch.autocast(self._device, self._torch.bfloat16),
            attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION),
        ):
            loss = self._compiled(tokens, targets)
        prepared = self._batch(following)
        loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach(), prepared

    def _batch(self, step: int) -> tuple[Any, Any]:
        pair = [self._torch.from_numpy(part).long() for part in self._batches.batch(step)]
        if self._device == "cpu":
            return pair[0], pair[1]
        tokens, targets = (part.pin_memory().to(self._device, non_blocking=True) for part in pair)
        return tokens, targets

    def _wait(self) -> None:
        if self._device != "cpu":
            self._torch.cuda.synchronize()


TRAIN: dict[Side, Callable[..., Run]] = {"ours": train_ours, "PyTorch": train_torch}


def measure_side(side: Side, name: str, batch: int, *, rehearse: bool) -> dict[str, Any]:
    """A row of the result, without the figures that need the other side; without times in a rehearsal."""
    size = (REHEARSED if rehearse else SIZES)[name]
    row: dict[str, Any] = empty_row(side, name, batch)
    try:
        run = TRAIN[side](size, batch, rehearse=rehearse)
    except Exception as error:
        if not says_no_memory(error):
            raise
        return row | {"note": OUT_OF_MEMORY}
    tokens = batch * size.context * size.window_steps(batch)
    speeds = [] if rehearse else [tokens / seconds for seconds in run.seconds]
    if run.joules is not None:
        row |= {"watts": run.joules / sum(run.seconds), "joules_per_token": run.joules / (tokens * len(run.seconds))}
    return row | {
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "windows": speeds,
        "held_bytes": run.held_bytes,
        "losses": run.losses,
        "description": run.description,
        "peak": run.peak,
        "note": run.note,
    }


def says_no_memory(error: Exception) -> bool:
    """Whether `error` is an out-of-memory error of CuPy or PyTorch."""
    return OUT_OF_MEMORY in str(error).lower() or "OutOfMemory" in type(error).__name__


def empty_row(side: Side, name: str, batch: int, note: str = "") -> dict[str, Any]:
    """A row without measurements."""
    nothing = dict.fromkeys(("tokens_per_second", "watts", "joules_per_token", "held_bytes", "description", "peak"))
    return {"side": side, "size": name, "batch": batch, **nothing, "windows": [], "losses": [], "note": note}


def main(arguments: list[str] | None = None) -> int:
    """Measure one side. Messages go to standard error, the row to standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("batch", type=int)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        row = measure_side(options.side, options.size, options.batch, rehearse=options.rehearse)
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
