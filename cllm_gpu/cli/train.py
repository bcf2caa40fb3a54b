"""cllm-gpu train"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.checkpoint.checkpoint import CHECKPOINTS, Checkpoint, identify_run, load_checkpoint, named_checkpoint
from cllm_gpu.cli import interrupted_status
from cllm_gpu.cli.config_flags import base_configuration, early_flags, open_data
from cllm_gpu.cli.parsing import Command, QuietOption
from cllm_gpu.cli.progress import ConsoleReporter, say, terminal
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.training.auto_batch import decide_batch, is_out_of_memory, memory_shortage, out_of_memory
from cllm_gpu.training.memory_plan import MemoryPlan, plan_memory
from cllm_gpu.training.run_folder import (
    begin_run,
    configuration_of,
    edited_settings,
    lock_run,
    newest_run,
    require_run,
    save_configuration,
    save_plan,
)
from cllm_gpu.training.samples import keep_sample, sample_pieces
from cllm_gpu.training.tensorboard import events, require_tensorboard
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class TrainOptions(QuietOption):
    """Train a model. Flags override the TOML file, which overrides the defaults."""

    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    config: Path | None = None
    """TOML file with the sections and names of the flags below."""
    resume: bool = False
    """Resume the run in --output (default: the newest) with its saved configuration, which flags override."""
    checkpoint: Path | None = None
    """With --resume: the checkpoint to resume from, by its folder or its name in the run, such as step_00000500
    (None: the newest that is sound)."""


COMMAND = Command(
    "train",
    TrainOptions,
    examples="""
    # the text of the Python standard library, with the defaults
    cllm-gpu train
    # your own text
    cllm-gpu train --data.source book.txt --model.size tiny --training.steps 100
    # resume the newest run, for more steps
    cllm-gpu train --resume --training.steps 120
    # fine-tune a trained model on another text
    cllm-gpu train --initial runs/001 --data.source other.txt --training.steps 50
    """,
    short=(("--batch", "--training.batch"),),
)


def main(arguments: list[str]) -> int:
    """Train. Returns exit status 0, or 128 + the signal that stopped it, after saving."""
    known = early_flags(arguments)
    if known.checkpoint and not known.resume:
        raise UserError("--checkpoint names what a run is resumed from; add --resume, or give a model as --initial")
    if not known.resume or {"-h", "--help"} & set(arguments):
        return _train(COMMAND.parse(arguments, TrainOptions(base_configuration(arguments))), None)
    if known.config:
        raise UserError("--resume continues a run with its own configuration; leave --config out")
    if known.initial:
        raise UserError("--resume continues a run from its own weights; leave --initial out")
    folder, named = _to_resume(known.output, known.checkpoint)
    with lock_run(folder):
        checkpoint = load_checkpoint(named or folder)
        own = configuration_of(checkpoint, folder)
        options = COMMAND.parse(arguments, TrainOptions(own))
        settings = dataclasses.replace(options.settings, output=folder)
        return _train(dataclasses.replace(options, settings=settings), checkpoint)


def _to_resume(output: Path | None, named: Path | None) -> tuple[Path, Path | None]:
    """The run to resume and the named checkpoint (None: its newest). Raises UserError if there is none."""
    if named is not None and len(named.parts) > 1:  # a path, not a name within the run
        named = named.absolute()
        run = named.parent.parent
        if named.parent.name != CHECKPOINTS:
            raise UserError(f"{named} is no checkpoint of a run; give RUN/{CHECKPOINTS}/step_… or its name alone")
        if output is not None and output.resolve() != run.resolve():
            raise UserError(f"{named} is a checkpoint of {run}, not of {output}: leave --output out")
        output = output or Path(os.path.relpath(run) if run.is_relative_to(Path.cwd()) else run)
    folder = output or newest_run()
    require_run(folder)
    return folder, named_checkpoint(folder, named.name) if named is not None else None


def _train(options: TrainOptions, checkpoint: Checkpoint | None) -> int:
    """Train a new run, or from `checkpoint` the run in options.settings.output, whose folder is locked."""
    began = time.monotonic()
    config = options.settings
    if config.training.tensorboard:
        require_tensorboard()  # report a missing package before training
    backend = get_backend(config.backend, workers=config.training.workers, precision=config.precision)
    display = ConsoleReporter(terminal(quiet=options.quiet), config.training.steps, backend.memory_held)
    display.message(backend.description)
    dataset = open_data(config, display, checkpoint)
    if dataset.tokenizer is not None:
        dataset.tokenizer.encode(config.prompt)  # report an invalid prompt before training
    architecture = config.model.architecture(dataset.vocabulary)
    config, decided = decide_batch(config, architecture, backend, len(dataset.train) // architecture.context)
    plan = plan_memory(config, architecture, backend)
    short = memory_shortage(config, architecture, backend, plan)
    if short is not None and backend.is_card:  # on a CPU, more memory may become free, or swap is used
        raise UserError(short)
    if checkpoint is None:
        folder = begin_run(config.output)
    else:
        assert config.output is not None
        folder = config.output
    # save the settings that results depend on as resolved, not as "auto": a resumed run uses the same
    loop = dataclasses.replace(config.training, workers=backend.workers)
    config = dataclasses.replace(config, output=folder, backend=backend.name, training=loop)
    with lock_run(folder) if checkpoint is None else contextlib.nullcontext():
        display.opening(config, architecture, dataset, plan)
        for line in (decided, short):
            if line is not None:
                display.message(line)
        free = backend.memory_free()
        try:
            return _run(config, backend, dataset, display, folder, plan, checkpoint, began)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(out_of_memory(config, architecture, backend, plan, free, error)) from error


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
                display.message(
                    f"training begins from the model in {config.initial}, step {trainer.state.initial['step']}"
                )
        else:
            trainer.restore(checkpoint)
            edited = edited_settings(folder, configuration_of(checkpoint, folder))
            for line in (*checkpoint.passed_over, edited, f"resumed {folder} at step {trainer.state.step}"):
                if line is not None:
                    display.message(line)
        trainer.state.run = identify_run(folder, trainer.state.run)
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
    """Generate a sample with the current model: print it as it arrives, and record it in the metrics."""
    if not config.training.sample_tokens or dataset.tokenizer is None:
        return
    text = display.sample(config.prompt, sample_pieces(config, trainer.model, dataset.tokenizer))
    if trainer.metrics:
        keep_sample(trainer.metrics, trainer.state.step, config.prompt, text)
