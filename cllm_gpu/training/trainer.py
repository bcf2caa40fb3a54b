"""The training loop: steps, metrics, evaluation, samples, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.checkpoint import Checkpoint, save_checkpoint
from cllm_gpu.checkpoint.finetune import begin_from
from cllm_gpu.checkpoint.safetensors_io import DamagedError
from cllm_gpu.config import Config
from cllm_gpu.data import Batches, Dataset, evaluation_batches
from cllm_gpu.data.token_file import DataError
from cllm_gpu.inference.evaluate import Evaluation, evaluate
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.optim.optimizer import Optimizer
from cllm_gpu.optim.schedules import rate_at
from cllm_gpu.training.data_parallel import GradientWorkers, gradient_layout
from cllm_gpu.training.diagnostics import DIAGNOSTICS
from cllm_gpu.training.graph_step import GraphStep, how_steps_run, why_on_host
from cllm_gpu.training.host_step import HostStep
from cllm_gpu.training.loss_guard import LossGuard
from cllm_gpu.training.metrics import MetricsLog
from cllm_gpu.training.reporter import Outcome, Reporter, Silent
from cllm_gpu.training.run_folder import METRICS
from cllm_gpu.training.samples import keep_sample, sample_pieces
from cllm_gpu.training.signals import Interrupts
from cllm_gpu.training.state import TrainerState
from cllm_gpu.training.step import StepContext, StepResult, TrainingStep
from cllm_gpu.training.step_timer import StepTimer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.text import visible


class _EvaluationCutShortError(Exception):
    """An interrupt came during an evaluation."""


class Trainer:
    """One run: the model, its optimizer and its data, and the loop over steps.

    `folder` is where metrics and checkpoints go; None keeps everything in memory.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        dataset: Dataset,
        *,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        self.config, self.backend, self.dataset, self.folder = config, backend, dataset, folder
        self.reporter: Reporter = reporter or Silent()
        loop = config.training
        self.architecture = config.model.architecture(dataset.vocabulary)
        if config.precision != backend.precision:
            raise UserError(f"precision is {config.precision}, but the backend was made for {backend.precision}")
        length = self.architecture.context
        self.layout = Layout(parameter_specs(self.architecture), backend.dtype)
        summed = gradient_layout(self.layout, backend, loop.sequences, loop.at_once)
        self.parameters, self.gradients = (x.views(backend.zeros(x.size, x.dtype)) for x in (self.layout, summed))
        self.model = Transformer(self.architecture, backend, self.parameters)
        self.workers = GradientWorkers(self.model, loop.at_once, length, recompute=loop.recompute, gradients=summed)
        split = dataclasses.replace(backend, ops=self.workers.ops)
        self.optimizer = Optimizer(config.optimizer, split, self.layout, seed=loop.seed)
        self.batches = Batches(dataset.train, batch=loop.sequences, context=length, seed=loop.seed)
        self.guard = LossGuard(
            maximum_skipped=loop.maximum_skipped,
            spike_window=loop.spike_window,
            spike_deviations=loop.spike_deviations,
        )
        self.state = TrainerState(config, dataset, self.model, self.optimizer, self.guard)
        self.metrics = MetricsLog(folder / METRICS) if folder else None
        self.diagnostics = MetricsLog(folder / DIAGNOSTICS) if folder else None
        self._step: TrainingStep | None = None
        self._timer = StepTimer(backend, self.architecture, loop.sequences)
        self._interrupts = Interrupts()
        self._deadline: float | None = None
        self._last_evaluation: Evaluation | None = None
        self._last_checkpoint: Path | None = None
        self._saved_step = -1

    def initialise(self) -> None:
        """The weights of the model to begin from, or fresh ones from the configured seed."""
        weights = self.optimizer.weights(self.parameters)
        if self.config.initial is not None:
            self.state.initial = begin_from(self.config, weights, self.dataset.tokenizer, self.backend).as_dict()
        else:
            weights.flat[...] = self.backend.asarray(initial_values(weights.layout, self.config.training.seed))
        self.optimizer.round_masters(self.parameters)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this very model. UserError if it is another's."""
        self.state.restore(checkpoint)
        self.batches.continue_at(self.state.step, self.state.tokens_seen // self.batches.context)
        self._saved_step = self.state.step
        self._step = None  # what it counts on a device is of before
        for log in (self.metrics, self.diagnostics):
            if log:
                log.truncate_after(self.state.step)

    def close(self) -> None:
        """End the worker threads."""
        self.workers.close()

    # ---- the loop

    def train(self, *, began: float | None = None) -> Outcome:
        """Steps until the configured number, a signal, the end of `training.minutes`, or too many skipped ones.

        Whatever ends it, the steps done are saved, but for a second Ctrl-C, which stops at once. UserError for too many
        skipped steps. `began`: when the minutes began, by `time.monotonic` (None: now).
        """
        minutes = self.config.training.minutes
        if minutes is not None:
            self._deadline = (time.monotonic() if began is None else began) + 60 * minutes
        # what is not finite is the guard's to find and to report
        with Interrupts() as self._interrupts, np.errstate(all="ignore"):
            if self.backend.device is not None:
                self.reporter.message(how_steps_run(self.config.training, self.optimizer, self.backend.device))
            if (line := self._timer.begin()) is not None:
                self.reporter.message(line)
            try:
                if self.state.due:
                    self._after_step()
                while self._goes_on():
                    self._one_step()
                    self._after_step()
            except DataError as error:
                self._stop_without_data(error)
            if self._saved_step != self.state.step:
                self._checkpoint(best=False)
        return Outcome(
            self.state.step,
            self._unfinished,
            self._interrupts.number,
            self.guard.skipped,
            self._last_evaluation,
            self._last_checkpoint,
        )

    @property
    def step(self) -> TrainingStep:
        """What computes the steps: enqueued on the backend's device, if it has one and the host is not needed."""
        if self._step is None:
            loop, schedule, peak = self.config.training, self.config.schedule, self.config.optimizer.rate
            context = StepContext(
                loop, self.model, self.optimizer, self.gradients, self.batches,
                partial(rate_at, schedule, peak, loop.steps), self.guard,
            )  # fmt: skip
            if self.backend.device is not None and why_on_host(loop, self.optimizer) is None:
                self._step = GraphStep(context, self.workers.compute_on_device, self.reporter.message)
            else:
                self._step = HostStep(context, self.workers, self.diagnostics)
        return self._step

    @property
    def _stopping(self) -> bool:
        """Whether a signal asks to stop, or the time is over; once it is so it stays so."""
        return self._interrupts.requested or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def _unfinished(self) -> bool:
        """Whether steps, or what follows the last one, are left to do."""
        return self.state.due or self.state.step < self.config.training.steps

    def _goes_on(self) -> bool:
        """Whether another step is to be finished: after an interrupt one that is under way."""
        if self._stopping:
            return self._step is not None and self._step.under_way > 0
        return self.state.step < self.config.training.steps

    def _one_step(self) -> None:
        """Finish a step; further ones are issued before its result is read, unless something stops between them."""
        while self._may_issue():
            self.step.issue(self.state.step + self.step.under_way)
        self._finish_step()

    def _finish_step(self) -> None:
        """Take the result of the oldest step under way."""
        result = self.step.take()
        self.guard.count(result.skipped, result.loss, result.gradient_norm)
        self.state.step += 1
        self.state.tokens_seen += self.batches.batch_size * self.batches.context
        with self._saving_first():
            self._record(result)
        if result.skipped is not None:
            self._refuse(result.skipped)

    def _stop_without_data(self, error: DataError) -> NoReturn:
        """Finish and save the steps whose data was sound; UserError, one line."""
        while self.step.under_way:
            self._finish_step()
        if self.state.step and self.folder is not None and self._saved_step != self.state.step:
            self._checkpoint(best=False)
        saved = f"; step {self.state.step} is saved: resume when the data is back" if self.state.step else ""
        raise UserError(f"{error}{saved if self.folder is not None else ''}") from error

    def _may_issue(self) -> bool:
        """Whether another step may begin before the result of the oldest one under way is read."""
        under_way = self.step.under_way
        if under_way == 0:
            return True
        stops = self._stopping or self._stops_after(self.state.step + under_way)
        return under_way < self.step.depth and not stops

    def _stops_after(self, step: int) -> bool:
        """Whether after so many steps the run ends, or the weights are evaluated, sampled from or saved."""
        loop = self.config.training
        often = (loop.evaluate_every, loop.sample_every, loop.checkpoint_every)
        return step >= loop.steps or any(every and step % every == 0 for every in often)

    def _refuse(self, reason: str) -> None:
        """Say that a step was skipped; after too many in a row save and stop."""
        self.reporter.message(f"step {self.state.step} skipped: {reason}")
        try:
            self.guard.check()
        except UserError:
            self.step.abandon()
            try:
                self._checkpoint(best=False)
            except DamagedError as error:  # weights that are not finite are not saved
                self.reporter.message(str(error))
            raise

    def _record(self, result: StepResult) -> None:
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.state.step,
            "loss": result.loss,
            "smoothed_loss": self.state.smooth(result.loss),
            "rate": result.rate,
            "gradient_norm": result.gradient_norm,
            "update_norm": result.update_norm,
            "skipped": result.skipped,
            "tokens": self.state.tokens_seen,
            **self._timer.step(),
        }
        if self.metrics:
            self.metrics.append(record)
        self.reporter.step(record)

    def _after_step(self) -> None:
        """Evaluation, sample and checkpoint, whichever is due; cut short by an interrupt, they stay due."""
        loop, step = self.config.training, self.state.step
        last = step == loop.steps
        self.state.due, best = True, False
        if last or (loop.evaluate_every and step % loop.evaluate_every == 0):
            try:
                with self._saving_first():
                    best = self._evaluate()
            except _EvaluationCutShortError:
                return
        self.state.due = False
        if not last and loop.sample_every and step % loop.sample_every == 0:
            with self._saving_first(best=best):
                self._sample()
        if best or last or (loop.checkpoint_every and step % loop.checkpoint_every == 0):
            self._checkpoint(best=best)

    # ---- evaluation

    def _evaluate(self) -> bool:
        """Evaluate the validation set; whether it is the best so far."""
        loop = self.config.training
        with self.backend.ranges("evaluation"):
            batches = evaluation_batches(
                self.dataset.validation,
                batch=loop.at_once,
                context=self.architecture.context,
                limit=loop.evaluation_batches or None,
            )
            bytes_per_token = self.dataset.bytes_per_token
            found = evaluate(self._losses, self._until_interrupted(batches), bytes_per_token, self.backend.to_host)
        self._last_evaluation = found
        record = {
            "kind": "evaluation",
            "step": self.state.step,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "accuracy": found.accuracy,
        }
        if self.metrics:
            self.metrics.append(record)
        self.reporter.evaluation(record)
        better = found.loss < self.state.best_loss
        self.state.best_loss = min(self.state.best_loss, found.loss)
        self._timer.restart()
        return better

    def _until_interrupted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._stopping:
                raise _EvaluationCutShortError
            yield batch

    def _sample(self) -> None:
        """Keep a text of the model as it is; the one at the end is the caller's to take and to show as it comes."""
        tokenizer = self.dataset.tokenizer
        if self.metrics is None or tokenizer is None or not self.config.training.sample_tokens:
            return
        text = "".join(sample_pieces(self.config, self.model, tokenizer))
        keep_sample(self.metrics, self.state.step, self.config.prompt, text)
        self.reporter.message(f"sample at step {self.state.step}: {visible(self.config.prompt + text)}")
        self._timer.restart()

    def _losses(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        return self.workers.losses(self.backend.asarray(tokens), self.backend.asarray(targets))

    # ---- checkpoints

    @contextlib.contextmanager
    def _saving_first(self, *, best: bool = False) -> Iterator[None]:
        """An error of the body, which changes no weights, ends the run; the steps done are saved before."""
        try:
            yield
        except (_EvaluationCutShortError, DataError):  # lost data is for _stop_without_data
            raise
        except Exception:
            under_way = 0 if self._step is None else self._step.under_way  # a device's weights are that much further
            if self.folder is not None and under_way == 0 and self._saved_step != self.state.step:
                with contextlib.suppress(UserError):  # where it cannot be saved either the first error is what to say
                    self._checkpoint(best=best)
                    self.reporter.message(f"stopped by an error at step {self.state.step}, which is saved")
            raise

    def _checkpoint(self, *, best: bool) -> None:
        if self.folder is None:
            return
        with self.backend.ranges("checkpoint"):
            for log in (self.metrics, self.diagnostics):
                if log:
                    log.sync()  # no checkpoint counts a step whose records a power failure could take
            kept = save_checkpoint(
                self.folder, self.state.snapshot(), keep_last=self.config.training.keep_last, best=best
            )
        self._last_checkpoint, self._saved_step = kept, self.state.step
        self._timer.restart()
