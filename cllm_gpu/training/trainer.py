"""The training loop: batches, steps, evaluation, logging, checkpoints.

A step is a pure function of the weights, the optimizer's state and the step number: batches, masks and rates are
computed from (seed, step). So a run that stops and resumes gives the same bits as one that does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm_gpu import config as configuration
from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.checkpoint import Checkpoint, save_checkpoint
from cllm_gpu.checkpoint.finetune import begin_from
from cllm_gpu.checkpoint.load_into import match_parameters, require_architecture
from cllm_gpu.config import Config
from cllm_gpu.data import IGNORE_INDEX, Batches, Dataset, evaluation_batches
from cllm_gpu.data.tokenizers import require_same
from cllm_gpu.inference.evaluate import Evaluation, evaluate
from cllm_gpu.model.activations import batch_dropout
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import is_narrow
from cllm_gpu.optim.optimizer import Optimizer
from cllm_gpu.optim.schedules import rate_at
from cllm_gpu.training.async_steps import StepsAhead, how_steps_run, may_run_ahead
from cllm_gpu.training.data_parallel import GradientWorkers, gradient_layout
from cllm_gpu.training.diagnostics import DIAGNOSTICS, Look, is_due
from cllm_gpu.training.loss_guard import StepGuard
from cllm_gpu.training.metrics import MetricsLog
from cllm_gpu.training.reporter import Outcome, Reporter, Silent
from cllm_gpu.training.run_folder import METRICS
from cllm_gpu.training.samples import keep_sample, sample_pieces
from cllm_gpu.training.signals import Interrupts
from cllm_gpu.training.step_timer import Pace
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.text import visible

SMOOTHING = 0.95
TOO_LARGE = "gradient too large to be squared"


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
        self.architecture = config.model.architecture(dataset.vocabulary)
        if config.precision != backend.precision:
            raise UserError(f"precision is {config.precision}, but the backend was made for {backend.precision}")
        self.layout = Layout(parameter_specs(self.architecture), backend.dtype)
        loop = config.training
        self._micro = loop.at_once
        summed = gradient_layout(self.layout, backend, loop.sequences, self._micro)
        self.parameters, self.gradients = (x.views(backend.zeros(x.size, x.dtype)) for x in (self.layout, summed))
        self.model = Transformer(self.architecture, backend, self.parameters)
        length = self.architecture.context
        self.workers = GradientWorkers(self.model, self._micro, length, recompute=loop.recompute, gradients=summed)
        split = dataclasses.replace(backend, ops=self.workers.ops)
        self.optimizer = Optimizer(config.optimizer, split, self.layout, seed=loop.seed)
        self.batches = Batches(dataset.train, batch=loop.sequences, context=length, seed=loop.seed)
        self.guard = StepGuard(
            maximum_skipped=loop.maximum_skipped,
            spike_window=loop.spike_window,
            spike_deviations=loop.spike_deviations,
        )
        self.metrics = MetricsLog(folder / METRICS) if folder else None
        self.diagnostics = MetricsLog(folder / DIAGNOSTICS) if folder else None
        self.done = 0
        self.tokens_seen = 0
        self.best_loss = math.inf
        self._smoothed = (0.0, 0.0)  # decayed sum of losses and of weights
        self._last_evaluation: Evaluation | None = None
        self._last_checkpoint: Path | None = None
        self._saved_step = -1
        self._pace = Pace(backend, self.architecture, loop.sequences)
        self._interrupts = Interrupts()
        self.origin: dict[str, Any] | None = None
        """The model that the run began from, as plain data; None: from the seed."""
        self._ahead: StepsAhead | None = None  # of a backend with a device
        self._due = False  # whether evaluation and checkpoint of the last step are still to be done

    def initialise(self) -> None:
        """The weights of the model to begin from, or fresh ones from the configured seed."""
        weights = self.optimizer.weights(self.parameters)
        if self.config.initial is not None:
            self.origin = begin_from(self.config, weights, self.dataset.tokenizer, self.backend).as_dict()
        else:
            weights.flat[...] = self.backend.asarray(initial_values(weights.layout, self.config.training.seed))
        self.optimizer.round_masters(self.parameters)

    # ---- the loop

    def train(self) -> Outcome:
        """Steps until the configured number, Ctrl-C, or too many skipped ones (UserError, after saving)."""
        # what is not finite is the guard's to find and to report
        with Interrupts() as self._interrupts, np.errstate(all="ignore"):
            if self.backend.device is not None:
                self.reporter.message(how_steps_run(self.config, self.backend.device))
            if (line := self._pace.begin()) is not None:
                self.reporter.message(line)
            if self._due:
                self._look_after()
            while self._goes_on():
                self._one_step()
                self._look_after()
            if self._interrupts.requested and self._saved_step != self.done:
                self._checkpoint(best=False)
        return Outcome(
            self.done,
            self._interrupts.requested and (self._due or self.done < self.config.training.steps),
            self.guard.skipped,
            self._last_evaluation,
            self._last_checkpoint,
        )

    def _goes_on(self) -> bool:
        """Whether another step is to be finished: also after an interrupt one that is under way on the device."""
        if self._interrupts.requested:
            return self._ahead is not None and self._ahead.under_way > 0
        return self.done < self.config.training.steps

    def _one_step(self) -> None:
        if may_run_ahead(self.config, self.backend):
            self._one_step_ahead()
            return
        step = self.done
        loss = self._gradients(step)
        with self.backend.ranges("optimizer"):
            norm = self.optimizer.gradient_norm(self.gradients)
            reason = self.guard.judge(loss, norm)
            look = self._look(step + 1)
            rate = rate_at(self.config.schedule, self.config.optimizer.rate, self.config.training.steps, step)
            update = 0.0
            if reason is None:
                report = self.optimizer.apply(self.parameters, self.gradients, rate=rate, gradient_norm=norm)
                update = report.update_norm
                reason = None if report.applied else TOO_LARGE
            self.guard.count(reason, loss, norm)
        self.done += 1
        if look is not None and self.diagnostics:
            self.diagnostics.append(look.record(self.done, reason))
        self._record(loss, rate, norm, update, reason)
        if reason is not None:
            self._refuse(reason)

    def _look(self, step: int) -> Look | None:
        """A look at the step under way, where one is due."""
        if self.diagnostics is None or not is_due(self.config.training.diagnose_every, step):
            return None
        weights = self.optimizer.weights(self.parameters)
        return Look(self.model, self.workers.workspaces, self.gradients, weights)

    def _one_step_ahead(self) -> None:
        """Take the results of one step; the next one is under way by then, unless something is due between them."""
        if self._ahead is None:
            self._ahead = StepsAhead(
                self.config, self.architecture, self.backend, self.workers.compute_on_device, self.optimizer,
                self.parameters, self.gradients, self.batches, self.reporter,
                skipped_in_a_row=self.guard.skipped_in_a_row,
            )  # fmt: skip
        result = self._ahead.take(self.done, further=not self._interrupts.requested)
        reason = self.guard.judge(result.loss, result.gradient_norm)
        if reason is None and result.skipped:
            reason = TOO_LARGE
        self.guard.count(reason, result.loss, result.gradient_norm)
        self.optimizer.updates += not result.skipped
        self.tokens_seen += result.tokens
        self.done += 1
        self._record(result.loss, result.rate, result.gradient_norm, result.update_norm, reason)
        if reason is not None:
            self._refuse(reason)

    def _refuse(self, reason: str) -> None:
        """Say that a step was skipped; after too many in a row save and stop."""
        self.reporter.message(f"step {self.done} skipped: {reason}")
        try:
            self.guard.check()
        except UserError:
            if self._ahead is not None:
                self._ahead.abandon()
            self._checkpoint(best=False)
            raise

    def _gradients(self, step: int) -> float:
        """Gradients of the batch of `step`, over micro-batches; the mean loss in nats."""
        with self.backend.ranges("data"):
            tokens, targets = self.batches.batch(step)
            counted = int(np.count_nonzero(targets != IGNORE_INDEX))
        self.tokens_seen += tokens.size
        total = 0.0
        for first in range(0, len(tokens), self._micro):
            rows = slice(first, first + self._micro)
            total += self.workers.loss_and_gradients(
                self.backend.asarray(tokens[rows]),
                self.backend.asarray(targets[rows]),
                self.gradients,
                gradient_scale=1.0 / max(1, counted),
                accumulate=first > 0,
                dropout=batch_dropout(self.architecture, seed=self.config.training.seed, step=step, first=first),
            )
        return total / max(1, counted)

    def _record(self, loss: float, rate: float, norm: float, update: float, reason: str | None) -> None:
        if math.isfinite(loss):
            self._smoothed = (SMOOTHING * self._smoothed[0] + loss, SMOOTHING * self._smoothed[1] + 1.0)
        record: dict[str, Any] = {
            "kind": "step",
            "step": self.done,
            "loss": loss,
            "smoothed_loss": self._smoothed[0] / self._smoothed[1] if self._smoothed[1] else math.nan,
            "rate": rate,
            "gradient_norm": norm,
            "update_norm": update,
            "skipped": reason,
            "tokens": self.tokens_seen,
            **self._pace.step(),
        }
        if self.metrics:
            self.metrics.append(record)
        self.reporter.step(record)

    def _look_after(self) -> None:
        """Evaluation and checkpoint where they are due; cut short by an interrupt, they stay due."""
        loop = self.config.training
        last = self.done == loop.steps
        self._due, best = True, False
        if last or (loop.evaluate_every and self.done % loop.evaluate_every == 0):
            try:
                best = self._evaluate()
            except _EvaluationCutShortError:
                return
        if not last and loop.sample_every and self.done % loop.sample_every == 0:
            self._sample()
        self._due = False
        if best or last or (loop.checkpoint_every and self.done % loop.checkpoint_every == 0):
            self._checkpoint(best=best)

    # ---- evaluation

    def _evaluate(self) -> bool:
        """Evaluate the validation set; whether it is the best so far."""
        loop = self.config.training
        with self.backend.ranges("evaluation"):
            batches = evaluation_batches(
                self.dataset.validation,
                batch=self._micro,
                context=self.architecture.context,
                limit=loop.evaluation_batches or None,
            )
            bytes_per_token = self.dataset.bytes_per_token
            found = evaluate(self._losses, self._until_interrupted(batches), bytes_per_token, self.backend.to_host)
        self._last_evaluation = found
        record = {
            "kind": "evaluation",
            "step": self.done,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "accuracy": found.accuracy,
        }
        if self.metrics:
            self.metrics.append(record)
        self.reporter.evaluation(record)
        better = found.loss < self.best_loss
        self.best_loss = min(self.best_loss, found.loss)
        self._pace.restart()
        return better

    def _until_interrupted(self, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._interrupts.requested:
                raise _EvaluationCutShortError
            yield batch

    def _sample(self) -> None:
        """Keep a text of the model as it is; the one at the end is the caller's to take and to show as it comes."""
        tokenizer = self.dataset.tokenizer
        if self.metrics is None or tokenizer is None or not self.config.training.sample_tokens:
            return
        text = "".join(sample_pieces(self.config, self.model, tokenizer))
        keep_sample(self.metrics, self.done, self.config.prompt, text)
        self.reporter.message(f"sample at step {self.done}: {visible(self.config.prompt + text)}")
        self._pace.restart()

    def _losses(self, tokens: Any, targets: Any) -> tuple[Any, Any]:
        return self.workers.losses(self.backend.asarray(tokens), self.backend.asarray(targets))

    # ---- checkpoints

    def _checkpoint(self, *, best: bool) -> None:
        if self.folder is None:
            return
        with self.backend.ranges("checkpoint"):
            if self.metrics:
                self.metrics.sync()  # no checkpoint counts a step whose metrics a power failure could take
            kept = save_checkpoint(self.folder, self.snapshot(), keep_last=self.config.training.keep_last, best=best)
        self._last_checkpoint, self._saved_step = kept, self.done
        self._pace.restart()

    def snapshot(self) -> Checkpoint:
        """Everything a run needs to go on, on the host."""
        tokenizer = self.dataset.tokenizer
        return Checkpoint(
            config=configuration.as_dict(self.config),
            architecture=self.architecture.as_dict(),
            tokenizer=tokenizer.as_dict() if tokenizer else {},
            step=self.done,
            state={
                "guard": self.guard.as_dict(),
                "optimizer_updates": self.optimizer.updates,
                "tokens_seen": self.tokens_seen,
                "best_loss": self.best_loss,
                "smoothed": list(self._smoothed),
                "due": self._due,
                "data": self.dataset.identity,
                "initial": self.origin,
            },
            parameters=self._host(self.optimizer.weights(self.parameters)),
            optimizer={name: self._host(moments) for name, moments in self.optimizer.state.items()},
        )

    def _host(self, values: Any) -> dict[str, np.ndarray[Any, Any]]:
        return {name: self.backend.to_host(view) for name, view in values.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this very model. UserError when it is another's."""
        self._require_same(checkpoint)
        weights = self.optimizer.weights(self.parameters)
        if is_narrow(weights.layout.dtype) and not all(is_narrow(x.dtype) for x in checkpoint.parameters.values()):
            raise UserError(
                "the checkpoint's weights are float32, and without master weights they would be rounded: "
                "resume with optimizer.master_weights, or begin a new run from it with --initial"
            )
        match_parameters(checkpoint.parameters, weights, self.backend)
        self.optimizer.round_masters(self.parameters)
        if set(checkpoint.optimizer) != set(self.optimizer.state):
            raise UserError(
                f"the checkpoint's optimizer keeps {sorted(checkpoint.optimizer)}, "
                f"{self.config.optimizer.name} needs {sorted(self.optimizer.state)}: resume with the optimizer it had"
            )
        for name, moments in self.optimizer.state.items():
            match_parameters(checkpoint.optimizer[name], moments, self.backend)
        state = checkpoint.state
        self.guard.restore(state["guard"])
        self.optimizer.updates = state["optimizer_updates"]
        self.tokens_seen = state["tokens_seen"]
        self.best_loss = state["best_loss"]
        self._smoothed = (state["smoothed"][0], state["smoothed"][1])
        self._due = state["due"]
        self.origin = state.get("initial")  # older checkpoints have none
        self.done = self._saved_step = checkpoint.step
        self._ahead = None  # its counts are those of before
        for log in (self.metrics, self.diagnostics):
            if log:
                log.truncate_after(self.done)

    def _require_same(self, checkpoint: Checkpoint) -> None:
        """UserError where the checkpoint's model, tokenizer or data are not this run's."""
        require_same(checkpoint.tokenizer, self.dataset.tokenizer)  # first: it decides on the model's vocabulary too
        require_architecture(checkpoint, self.architecture)
        if checkpoint.state["data"] != self.dataset.identity:
            raise UserError(
                f"{self.dataset.train.name} is not what the checkpoint was trained on, or has changed since: "
                "resume with the same text, or begin a new run"
            )

    def close(self) -> None:
        """End the worker threads."""
        self.workers.close()
