"""cllm-gpu lattice"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cllm_gpu.backend import get_backend
from cllm_gpu.checkpoint.pretrained import PretrainedModel, load_pretrained, require_tokenizer
from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say
from cllm_gpu.data.tokenizers import Tokenizer
from cllm_gpu.ops.reference.embedding import MAXIMUM_VOCABULARY
from cllm_gpu.report.figure import require_plots, save_figure
from cllm_gpu.report.lattice_plots import (
    LABELLED,
    draw_lattice,
    draw_scalars,
    draw_weights,
    learned_scalars,
    prompt_weights,
)
from cllm_gpu.utils.errors import UserError

BYTES = 257
LONGEST_PROMPT = 128


@dataclass(frozen=True)
class LatticeOptions:
    """Plot the lattice of a vocabulary, and what a crystalline model learned of it."""

    model: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """Run folder or checkpoint (None: only the lattice)."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to use if the model is a run folder."""
    vocabulary: int | None = None
    """Vocabulary size of the lattice (None: the model's, else that of bytes)."""
    prompt: str = "for key in keys:\n    value = values[key]\n    print(key, va"
    """Text whose attention is plotted."""
    layer: int | None = None
    """Layer to plot (None: that of the selected head)."""
    head: int | None = None
    """Head to plot (None: the one whose attention weights the terms change most)."""
    output: Path = Path("lattice")
    """Folder for the plots, each as PNG and SVG."""
    backend: str | None = None
    """auto, numpy, native, cupy or simulator (None: $CLLM_BACKEND, else auto)."""


COMMAND = Command(
    "lattice",
    LatticeOptions,
    examples="""
    # the lattice of the 257 byte tokens
    cllm-gpu lattice
    # the learned scalars of a crystalline model, and its attention on a prompt
    cllm-gpu lattice runs/003 --prompt "three times three is" --output pictures
    """,
)


def main(arguments: list[str]) -> int:
    """Write the plots. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    require_plots()
    trained = (
        load_pretrained(options.model, get_backend(options.backend), options.checkpoint) if options.model else None
    )
    figures = {"lattice": _lattice(options, trained)}
    if trained is not None and options.model is not None:
        figures |= _learnt(options, trained, options.model)
    for name, figure in figures.items():
        for ending in ("png", "svg"):
            path = options.output / f"{name}.{ending}"
            save_figure(figure, path)
            say(f"written: {path}")
    return 0


def _lattice(options: LatticeOptions, trained: PretrainedModel | None) -> Any:
    own_size = trained.model.architecture.vocabulary if trained else BYTES
    vocabulary = own_size if options.vocabulary is None else options.vocabulary
    if not 1 <= vocabulary <= MAXIMUM_VOCABULARY:
        raise UserError(f"--vocabulary is {vocabulary}; it must lie between 1 and {MAXIMUM_VOCABULARY}")
    names = None
    if vocabulary <= LABELLED:
        tokenizer = trained.tokenizer if trained else None
        own = tokenizer is not None and tokenizer.vocabulary == vocabulary
        names = [_name(tokenizer, t) if own else chr(t) if 32 < t < 127 else "" for t in range(vocabulary)]
    return draw_lattice(vocabulary, names)


def _name(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text as a label; empty if it is not printable."""
    text = "" if tokenizer is None else tokenizer.decode([token])
    marks = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    written = "".join(marks.get(c, c) for c in text)
    # a dollar sign would start a formula
    return written.replace("$", r"\$") if written.isprintable() and "\ufffd" not in written else ""


def _learnt(options: LatticeOptions, trained: PretrainedModel, path: Path) -> dict[str, Any]:
    """Plots of the learned scalars and of the attention weights of the prompt."""
    scalars, names = learned_scalars(trained.model)
    if not names:
        raise UserError(
            f"the model in {path} has no lattice terms; train one with --model.attention crystalline, "
            "or give --vocabulary without a model"
        )
    tokenizer = require_tokenizer(trained, path)
    tokens = tokenizer.encode(options.prompt).astype(np.int64)[
        : min(LONGEST_PROMPT, trained.model.architecture.context)
    ]
    if tokens.size < 2:
        raise UserError("--prompt has fewer than two tokens; give a longer text")
    layer, head, with_terms, without = _chosen(options, trained, tokens)
    written = [_name(tokenizer, int(token)) or f"{token}" for token in tokens]
    title = f"attention of layer {layer}, head {head}"
    return {"scalars": draw_scalars(scalars, names), "weights": draw_weights(with_terms, without, written, title)}


def _chosen(options: LatticeOptions, trained: PretrainedModel, tokens: Any) -> tuple[int, int, Any, Any]:
    """(layer, head, weights with terms, weights without): as requested, or where the terms change the weights most."""
    a = trained.model.architecture
    for name, value, count in (("layer", options.layer, a.layers), ("head", options.head, a.heads)):
        if value is not None and not 0 <= value < count:
            raise UserError(f"--{name} is {value}; the model has {name}s 0 to {count - 1}")
    best: tuple[float, int, int, Any, Any] | None = None
    for layer in range(a.layers) if options.layer is None else (options.layer,):
        with_terms, without = prompt_weights(trained.model, tokens, layer)
        for head in range(a.heads) if options.head is None else (options.head,):
            change = float(np.abs(with_terms[head] - without[head]).sum())
            if best is None or change > best[0]:
                best = (change, layer, head, with_terms[head], without[head])
    assert best is not None
    return best[1:]
