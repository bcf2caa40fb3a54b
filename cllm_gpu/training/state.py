"""What a checkpoint holds of a run, and how a run goes on from one.

A step is a pure function of the weights, the optimizer's state and the step number: batches, masks and rates are
computed from the seed, the step and the samples seen. So a run that stops and resumes gives the same bits as one that
does not.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cllm_gpu import config as configuration
from cllm_gpu.checkpoint.checkpoint import Checkpoint
from cllm_gpu.checkpoint.load_into import match_parameters, require_architecture
from cllm_gpu.config import Config
from cllm_gpu.data import Dataset
from cllm_gpu.data.tokenizers import require_same_tokenizer
from cllm_gpu.model.parameters import FlatParameters
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.precision import is_narrow
from cllm_gpu.optim.optimizer import Optimizer
from cllm_gpu.training.loss_guard import LossGuard
from cllm_gpu.utils.errors import UserError

SMOOTHING = 0.95
"""Weight of the earlier losses in the smoothed one, a step later."""


class TrainerState:
    """How far a run is, beside the weights, moments and counts that model, optimizer and guard hold."""

    def __init__(
        self, config: Config, dataset: Dataset, model: Transformer, optimizer: Optimizer, guard: LossGuard
    ) -> None:
        self._config, self._dataset = config, dataset
        self._model, self._optimizer, self._guard = model, optimizer, guard
        self.step = 0
        """Steps done."""
        self.tokens_seen = 0
        self.best_loss = math.inf
        """The lowest validation loss."""
        self.due = False
        """Whether the evaluation and checkpoint of the last step are still to be done."""
        self.initial: dict[str, Any] | None = None
        """The model that the run began from, as plain data; None if it began from the seed."""
        self.run: str | None = None
        """Identity of the run, by which its checkpoints are known; None if it has no folder, or is of cllm-gpu 0.1."""
        self._smoothed = (0.0, 0.0)  # decayed sum of losses and of weights

    def smooth(self, loss: float) -> float:
        """The mean of the losses so far and this one, the later ones weighing more; non-finite ones are left out."""
        total, weight = self._smoothed
        if math.isfinite(loss):
            total, weight = self._smoothed = (SMOOTHING * total + loss, SMOOTHING * weight + 1.0)
        return total / weight if weight else math.nan

    def snapshot(self) -> Checkpoint:
        """All that a run needs to go on; holds views of the weights and moments, no copies, on a CPU."""
        tokenizer = self._dataset.tokenizer
        weights = self._optimizer.weights(self._model.parameters)
        return Checkpoint(
            config=configuration.as_dict(configuration.with_absolute_paths(self._config)),
            architecture=self._model.architecture.as_dict(),
            tokenizer=tokenizer.as_dict() if tokenizer else {},
            step=self.step,
            state={
                "guard": self._guard.as_dict(),
                "optimizer_updates": self._optimizer.updates,
                "tokens_seen": self.tokens_seen,
                "best_loss": self.best_loss,
                "smoothed": list(self._smoothed),
                "due": self.due,
                "data": self._dataset.identity,
                "initial": self.initial,
                "run": self.run,
            },
            parameters=self._on_host(weights),
            optimizer={name: self._on_host(moments) for name, moments in self._optimizer.state.items()},
        )

    def _on_host(self, values: FlatParameters) -> dict[str, np.ndarray[Any, Any]]:
        return {name: self._model.backend.to_host(view) for name, view in values.items()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of this very model. UserError if it is another's."""
        self._require_same_run(checkpoint)
        self._restore_weights(checkpoint)
        self._restore_moments(checkpoint)
        state = checkpoint.state
        self._guard.restore(state["guard"])
        self._optimizer.updates = state["optimizer_updates"]
        self.step = checkpoint.step
        self.tokens_seen = state["tokens_seen"]
        self.best_loss = state["best_loss"]
        self._smoothed = (state["smoothed"][0], state["smoothed"][1])
        self.due = state["due"]
        self.initial, self.run = state.get("initial"), state.get("run")  # older checkpoints have none

    def _require_same_run(self, checkpoint: Checkpoint) -> None:
        """UserError if the checkpoint's model, tokenizer, data or seed are not this run's, or its step is too far."""
        require_same_tokenizer(checkpoint.tokenizer, self._dataset.tokenizer)  # first: it determines the vocabulary
        require_architecture(checkpoint, self._model.architecture)
        if checkpoint.state["data"] != self._dataset.identity:
            raise UserError(
                f"{self._dataset.train.name} is not what the checkpoint was trained on, or has changed since: "
                "resume with the same text, or begin a new run"
            )
        loop, seed = self._config.training, checkpoint.config["training"]["seed"]
        if loop.seed != seed:
            raise UserError(
                f"training.seed is {loop.seed}, but the run has seed {seed}: with another it would see some windows "
                "twice and others never; leave the flag out, or begin a new run from its model with --initial"
            )
        if loop.steps < checkpoint.step:
            raise UserError(
                f"training.steps is {loop.steps}, but the checkpoint is at step {checkpoint.step}: give at least "
                f"{checkpoint.step}, or an earlier checkpoint with --checkpoint"
            )

    def _restore_weights(self, checkpoint: Checkpoint) -> None:
        weights = self._optimizer.weights(self._model.parameters)
        if is_narrow(weights.layout.dtype) and not all(is_narrow(x.dtype) for x in checkpoint.parameters.values()):
            raise UserError(
                "the checkpoint's weights are float32, and without master weights they would be rounded: "
                "resume with optimizer.master_weights, or begin a new run from it with --initial"
            )
        match_parameters(checkpoint.parameters, weights, self._model.backend)
        self._optimizer.round_masters(self._model.parameters)

    def _restore_moments(self, checkpoint: Checkpoint) -> None:
        if set(checkpoint.optimizer) != set(self._optimizer.state):
            raise UserError(
                f"the checkpoint's optimizer keeps {sorted(checkpoint.optimizer)}, {self._config.optimizer.name} needs "
                f"{sorted(self._optimizer.state)}: resume with the optimizer it had"
            )
        for name, moments in self._optimizer.state.items():
            match_parameters(checkpoint.optimizer[name], moments, self._model.backend)
