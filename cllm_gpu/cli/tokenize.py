"""cllm-gpu tokenize"""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cllm_gpu.cli.parsing import Command, QuietOption
from cllm_gpu.cli.progress import byte_progress, lossy_line, say, terminal
from cllm_gpu.config import DataConfig
from cllm_gpu.data.bpe import Reading, learn_bpe, measure, require_vocabulary
from cllm_gpu.data.dataset import open_prepared, text_corpus
from cllm_gpu.data.prepare import new_folder
from cllm_gpu.data.sources import Corpus
from cllm_gpu.data.split import Part, require_fraction
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer, lost_share, tokenizer_label
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.files import clear_errors, readable_size, write_atomically

VOCABULARY = 8192
OUTPUT = Path("tokenizer.json")


@dataclass(frozen=True)
class TokenizeOptions(QuietOption):
    """Train a byte-level BPE tokenizer, or use one; prepare token shards."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """"stdlib", a text file, folder, glob or .jsonl file."""
    vocabulary: int | None = None
    """Vocabulary size, including the 256 bytes and the end of text (None: 8192)."""
    output: Path | None = None
    """File to write; must not exist yet (None: tokenizer.json)."""
    tokenizer: str | None = None
    """Do not train a tokenizer: use "bytes" or this tokenizer.json."""
    shards: Path | None = None
    """New folder for the token shards, to train from with --data.source FOLDER."""
    validation_fraction: float = DataConfig.validation_fraction
    """Fraction of the documents held out for validation, as --data.validation-fraction; not trained on."""
    text_field: str = DataConfig.text_field
    """Field of the records that contains the text, as --data.text-field."""
    separator: str | None = None
    """Text between documents, as --data.separator."""
    seed: int = DataConfig.seed
    """Seed of the choice of validation documents, as --data.seed."""
    megabytes: int = 500
    """Train on at most this much text, sampled evenly from all of it."""


COMMAND = Command(
    "tokenize",
    TokenizeOptions,
    examples="""
    # a vocabulary of 4096 from the Python standard library
    cllm-gpu tokenize stdlib --vocabulary 4096 --output stdlib.json
    # train on your own text, and prepare its shards
    cllm-gpu tokenize book.txt --vocabulary 300 --shards shards
    # bytes per token on another text
    cllm-gpu tokenize other.txt --tokenizer tokenizer.json
    """,
)


def main(arguments: list[str]) -> int:
    """Train or load a tokenizer, measure it, prepare shards. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    _validate(options)
    console = terminal(quiet=options.quiet)
    corpus = _corpus(options)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else _train_tokenizer(options, corpus, console)
    for line in tokenizer.notes:
        say(line, console)
    if lost := lost_share(tokenizer, corpus.sample()):
        say(lossy_line(lost), console)
    if options.shards:
        _prepare(options, options.shards, tokenizer, console)
    elif options.tokenizer:
        with byte_progress(console, "reading text") as progress:
            reading = Reading(corpus, fraction=options.validation_fraction, seed=options.seed, progress=progress)
            measure(reading)
        say(f"{tokenizer.name}: vocabulary {tokenizer.vocabulary:,}, {_measured(reading, tokenizer)}")
    say(f"train with it: {_training_command(options, tokenizer)}", console, unbroken=True)
    return 0


def _validate(options: TokenizeOptions) -> None:
    """Raises UserError for invalid options, before anything is read."""
    require_fraction(options.validation_fraction)
    if options.tokenizer:
        for name in ("vocabulary", "output"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name} is for training a tokenizer, --tokenizer for using one: give only one of them"
                )
    else:
        require_vocabulary(_vocabulary(options))
        if options.megabytes < 1:
            raise UserError(f"--megabytes is {options.megabytes}; it must be at least 1")
        _require_new(options.output or OUTPUT, "--output")
    if options.shards:
        _require_new(options.shards, "--shards")


def _require_new(path: Path, flag: str) -> None:
    """Raises UserError unless `path` does not exist and this process can create it."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already: name another with {flag}, or move it away")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    with clear_errors("write", path), tempfile.TemporaryFile(dir=folder):
        pass


def _corpus(options: TokenizeOptions) -> Corpus:
    return text_corpus(options.source, TextOptions(options.text_field, options.separator))


def _vocabulary(options: TokenizeOptions) -> int:
    return VOCABULARY if options.vocabulary is None else options.vocabulary


def _train_tokenizer(options: TokenizeOptions, corpus: Corpus, console: Console) -> Tokenizer:
    """Train a tokenizer on the training part and write it to its file."""
    path = options.output or OUTPUT
    with byte_progress(console, "reading text", then="learning tokens") as progress:
        reading = Reading(
            corpus,
            fraction=options.validation_fraction,
            seed=options.seed,
            limit=options.megabytes * 1_000_000,
            progress=progress,
        )
        json_text = learn_bpe(reading, _vocabulary(options))
    tokenizer = HuggingFaceTokenizer(json_text, str(path))
    write_atomically(path, json_text)
    if tokenizer.vocabulary < _vocabulary(options):
        say(f"no pair occurs twice any more: fewer tokens than {_vocabulary(options):,}", console)
    say(f"trained on {readable_size(reading.training_share.taken)} of {corpus.name}, without validation text", console)
    say(f"vocabulary {tokenizer.vocabulary:,}, {_measured(reading, tokenizer)}", console)
    say(f"written: {tokenizer_label(tokenizer.name, tokenizer.fingerprint)}", console)
    return tokenizer


def _measured(reading: Reading, tokenizer: Tokenizer) -> str:
    train, validation = (_ratio(reading.samples[part].bytes_per_token(tokenizer)) for part in Part)
    return f"bytes per token: {train} training, {validation} validation"


def _ratio(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _prepare(options: TokenizeOptions, folder: Path, tokenizer: Tokenizer, console: Console) -> None:
    corpus = _corpus(options)  # a new object, whose count of skipped files starts at zero
    with byte_progress(console, "preparing shards") as progress:
        new_folder(
            *(corpus, tokenizer, folder),
            fraction=options.validation_fraction,
            seed=options.seed,
            progress=progress,
        )
    made = open_prepared(folder, tokenizer, str(folder))
    for part, source in ((Part.TRAIN, made.train), (Part.VALIDATION, made.validation)):
        documents = "1 document" if source.documents == 1 else f"{source.documents:,} documents"
        counted = f"{len(source):,} tokens, {_ratio(source.bytes_per_token)} bytes per token"
        say(f"{part.name.lower()}: {documents}, {counted}", console)
    say(f"written: {folder}", console)


def _training_command(options: TokenizeOptions, tokenizer: Tokenizer) -> str:
    words = ["cllm-gpu", "train", "--data.source", str(options.shards or options.source)]
    words += ["--data.tokenizer", tokenizer.name]
    if not options.shards:  # the shards hold their split
        if options.validation_fraction != DataConfig.validation_fraction:
            words += ["--data.validation-fraction", f"{options.validation_fraction}"]
        if options.seed != DataConfig.seed:
            words += ["--data.seed", f"{options.seed}"]
        if options.text_field != DataConfig.text_field:
            words += ["--data.text-field", options.text_field]
        if options.separator is not None:
            words += ["--data.separator", options.separator]
    return shlex.join(words)
