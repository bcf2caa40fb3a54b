"""cllm-gpu train"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.checkpoint.checkpoint import Checkpoint, load_checkpoint
from cllm_gpu.cli import interrupted_status
from cllm_gpu.cli.config_flags import base_configuration, early_flags, open_data
from cllm_gpu.cli.parsing import Command, Quietable
from cllm_gpu.cli.progress import ConsoleReporter, say, terminal
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.training.auto_batch import decide_batch, is_out_of_memory, memory_shortage, out_of_memory
from cllm_gpu.training.memory_plan import MemoryPlan, plan_memory
from cllm_gpu.training.run_folder import (
    begin_run,
    load_configuration,
    lock_run,
    newest_run,
    save_configuration,
    save_plan,
)
from cllm_gpu.training.samples import keep_sample, sample_pieces
from cllm_gpu.training.tensorboard import events, require_tensorboard
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class TrainOptions(Quietable):
    """Train a model. Flags stand over the TOML file, the file over the defaults."""

    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    config: Path | None = None
    """TOML file with the sections and names of the flags below."""
    resume: bool = False
    """Continue the run in --output (default: the newest), with its own configuration under the flags."""


COMMAND = Command(
    "train",
    TrainOptions,
    examples="""
    # the text of the Python standard library, with the defaults
    cllm-gpu train
    # a text of your own
    cllm-gpu train --data.source book.txt --model.size tiny --training.steps 100
    # the newest run again, on to more steps
    cllm-gpu train --resume --training.steps 120
    # a trained model further, on another text
    cllm-gpu train --initial runs/001 --data.source other.txt --training.steps 50
    """,
    short=(("--batch", "--training.batch"),),
)


def main(arguments: list[str]) -> int:
    """Train; exit status 0, or 128 + the signal that interrupted it (saved, and said how to resume)."""
    began = time.monotonic()
    options = COMMAND.parse(arguments, _defaults(arguments))
    config = options.settings
    if config.training.tensorboard:
        require_tensorboard()  # missing, it is an error before training
    backend = get_backend(config.backend, workers=config.training.workers, precision=config.precision)
    display = ConsoleReporter(terminal(quiet=options.quiet), config.training.steps, backend.memory_held)
    display.message(backend.description)
    dataset = open_data(config, display, config.output if options.resume else None)
    if dataset.tokenizer is not None:
        dataset.tokenizer.encode(config.prompt)  # a prompt it cannot read is an error before training
    architecture = config.model.architecture(dataset.vocabulary)
    config, decided = decide_batch(config, architecture, backend, len(dataset.train) // architecture.context)
    plan = plan_memory(config, architecture, backend)
    short = memory_shortage(config, architecture, backend, plan)
    if short is not None and backend.is_card:  # a CPU may have what is not free now, or swap
        raise UserError(short)
    folder = (config.output or newest_run()) if options.resume else begin_run(config.output)
    # what the bits depend on is saved as it was, not as "auto": a resumed run takes the same
    loop = dataclasses.replace(config.training, workers=backend.workers)
    config = dataclasses.replace(config, output=folder, backend=backend.name, training=loop)
    with lock_run(folder):
        display.opening(config, architecture, dataset, plan)
        for line in (decided, short):
            if line is not None:
                display.message(line)
        checkpoint, free = load_checkpoint(folder) if options.resume else None, backend.memory_free()
        try:
            return _run(config, backend, dataset, display, folder, plan, checkpoint, began)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(out_of_memory(config, architecture, backend, plan, free, error)) from error


def _defaults(arguments: list[str]) -> TrainOptions:
    """What the flags stand over: the TOML file of --config, or with --resume the run's own configuration."""
    known = early_flags(arguments)
    if known.resume:
        if known.config:
            raise UserError("--resume continues a run with its own configuration; leave --config out")
        if known.initial:
            raise UserError("--resume continues a run from its own weights; leave --initial out")
        return TrainOptions(load_configuration(known.output or newest_run()))
    return TrainOptions(base_configuration(arguments))


def _run(
    config: Config,
    backend: Backend,
    dataset: Dataset,
    display: ConsoleReporter,
    folder: Path,
    plan: MemoryPlan,
    checkpoint: Checkpoint | None,
    began: float,
) -> int:
    trainer = Trainer(config, backend, dataset, folder=folder, reporter=display)
    try:
        if checkpoint is None:
            trainer.initialise()
            if trainer.state.initial is not None:
                display.message("training begins from the model in {path}, step {step}".format(**trainer.state.initial))
        else:
            trainer.restore(checkpoint)
            for line in (*checkpoint.passed_over, f"resumed {folder} at step {trainer.state.step}"):
                display.message(line)
        save_configuration(folder, config)
        save_plan(folder, plan)
        with contextlib.ExitStack() as shown:
            if config.training.tensorboard:
                trainer.reporter = shown.enter_context(events(folder, trainer.state.step, display, backend.memory_held))
            shown.enter_context(display.running(trainer.state.step))
            outcome = trainer.train(began=began)
        display.outcome(outcome, folder)
        if outcome.interrupted:
            command = f"cllm-gpu train --resume --output {folder}"
            why = "the time is over" if outcome.signal is None else "interrupted"
            say(f"{why}; resume with: {command}", display.console, unbroken=True)
            return 0 if outcome.signal is None else interrupted_status(outcome.signal)
        _sample(config, trainer, dataset, display)
    finally:
        trainer.close()
    return 0


def _sample(config: Config, trainer: Trainer, dataset: Dataset, display: ConsoleReporter) -> None:
    """Text generated by the model as it is now: shown as it comes, and kept."""
    if not config.training.sample_tokens or dataset.tokenizer is None:
        return
    text = display.sample(config.prompt, sample_pieces(config, trainer.model, dataset.tokenizer))
    if trainer.metrics:
        keep_sample(trainer.metrics, trainer.state.step, config.prompt, text)
