"""cllm-gpu evaluate"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.pretrained import PretrainedModel, load_pretrained, require_tokenizer
from cllm_gpu.cli.parsing import Command, QuietOption
from cllm_gpu.cli.progress import LOSSY_BITS, count_progress, lossy_line, say, terminal
from cllm_gpu.data import evaluation_batches, evaluation_windows, open_text
from cllm_gpu.data.text import TEXT_FIELD, TextOptions
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.data.tokens import Batch
from cllm_gpu.inference.evaluate import evaluate, model_losses, require_finite_loss
from cllm_gpu.inference.hellaswag import Choices, choose, read_hellaswag
from cllm_gpu.training.run_folder import newest_run
from cllm_gpu.utils.errors import UserError


@dataclass(frozen=True)
class EvaluateOptions(QuietOption):
    """Evaluate a model on a text, or on a multiple-choice task."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Text file, folder, glob or .jsonl file; with --task the task's file."""
    task: Literal["hellaswag"] | None = None
    """Evaluate a multiple-choice task from a JSON Lines file: acc by the sum of log-likelihoods, acc_norm divides it by
    the length in characters."""
    model: Path | None = None
    """Run folder or checkpoint (None: the newest run)."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to use if the model is a run folder."""
    batch: int = 16
    """Batch size in sequences."""
    batches: int = 0
    """Evaluate at most this many batches, spread evenly over the text; 0: the whole text. Not for tasks."""
    text_field: str = TEXT_FIELD
    """Field of the records that contains the text, as --data.text-field."""
    separator: str | None = None
    """Text between documents, as --data.separator."""
    json: bool = False
    """Print JSON instead of text."""
    backend: str | None = None
    """auto, numpy, native, cupy or simulator (None: $CLLM_BACKEND, else auto)."""


COMMAND = Command(
    "evaluate",
    EvaluateOptions,
    examples="""
    # the newest run's best model on a text
    cllm-gpu evaluate book.txt
    # a given run on part of the text, with JSON output
    cllm-gpu evaluate book.txt --model runs/001 --batches 5 --json
    # accuracy on HellaSwag
    cllm-gpu evaluate hellaswag_val.jsonl --task hellaswag
    """,
)


def main(arguments: list[str]) -> int:
    """Evaluate, with progress on standard error if it is a terminal. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    if options.batch < 1 or options.batches < 0:
        raise UserError(f"--batch {options.batch} must be at least 1 and --batches {options.batches} at least 0")
    if options.task and options.batches:
        raise UserError(f"--batches is for texts; --task {options.task} always uses the whole file")
    path = options.model or newest_run()
    trained = load_pretrained(path, get_backend(options.backend), options.checkpoint)
    if options.task:
        return _task(options, trained, require_tokenizer(trained, path))
    return _text(options, path, trained, require_tokenizer(trained, path))


def _text(options: EvaluateOptions, path: Path, trained: PretrainedModel, tokenizer: Tokenizer) -> int:
    """Evaluate the loss on a text."""
    source = open_text(options.source, tokenizer, TextOptions(options.text_field, options.separator))
    bytes_per_token = source.text_bytes / (len(source) - 1) if source.text_bytes else None  # the first has no loss
    batch, context, limit = options.batch, trained.model.architecture.context, options.batches or None
    total = evaluation_windows(source, batch=batch, context=context, limit=limit)
    batches = evaluation_batches(source, batch=batch, context=context, limit=limit)
    with count_progress(terminal(quiet=options.quiet, errors=True), "evaluating", total) as progress:
        losses = model_losses(trained.model)
        found = evaluate(
            losses, _with_progress(batches, total, progress), bytes_per_token, trained.model.backend.to_host
        )
    require_finite_loss(found, path)
    if options.json:
        print(json.dumps(found.as_dict() | ({"characters_lost": source.lost} if source.lost else {})))
        return 0
    if source.lost:
        say(lossy_line(source.lost), terminal(quiet=options.quiet, errors=True))
    unit = LOSSY_BITS if source.lost else "bits/byte"
    bits = f"  {found.bits_per_byte:.4f} {unit}" if found.bits_per_byte is not None else ""
    say(
        f"loss {found.loss:.4f} nats/token  perplexity {found.perplexity:.3f}{bits}  "
        f"accuracy {found.accuracy:.2%}  ({found.tokens:,} tokens, step {trained.step})"
    )
    return 0


def _with_progress(batches: Iterator[Batch], total: int, progress: Callable[[int, str], None]) -> Iterator[Batch]:
    """Yields the batches and calls `progress` after each; rows of padding in the last are not counted."""
    done = 0
    for batch in batches:
        yield batch
        done += len(batch[0])
        progress(min(done, total), "evaluating")


def _task(options: EvaluateOptions, trained: PretrainedModel, tokenizer: Tokenizer) -> int:
    """Evaluate a multiple-choice task."""
    items = read_hellaswag(Path(options.source))
    with count_progress(terminal(quiet=options.quiet, errors=True), "items", len(items)) as progress:

        def tell(done: int, so_far: Choices) -> None:
            progress(done, f"acc {so_far.accuracy:.1%} norm {so_far.accuracy_per_character:.1%}")

        found = choose(
            items,
            tokenizer,
            model_losses(trained.model),
            trained.model.backend.to_host,
            context=trained.model.architecture.context,
            batch=options.batch,
            progress=tell,
        )
    if options.json:
        print(json.dumps({"task": options.task, **found.as_dict()}))
        return 0
    shares = {"acc": found.accuracy, "acc_norm": found.accuracy_per_character}
    words = "  ".join(f"{name} {share:.2%}{_spread(found, share)}" for name, share in shares.items())
    say(f"{options.task}: {words}  ({found.items:,} items, step {trained.step})")
    return 0


def _spread(found: Choices, share: float) -> str:
    error = found.standard_error(share)
    return "" if error is None else f" ± {error:.2%}"
