"""Opens any data source as two verified token streams, for training and validation."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cllm_gpu.data import patterns
from cllm_gpu.data.batches import require_length
from cllm_gpu.data.llmc import is_llmc, open_llmc
from cllm_gpu.data.prepare import SHARD_NAMES, Progress, corpus_identity, prepared_folder, prepared_with
from cllm_gpu.data.shards import ShardHeader, is_shard, open_shard
from cllm_gpu.data.sources import Corpus, find_corpus
from cllm_gpu.data.split import Part, require_fraction
from cllm_gpu.data.text import TextOptions
from cllm_gpu.data.tokenizers import END_OF_TEXT_NAMES, Tokenizer, load_tokenizer, lost_share, tokenizer_label
from cllm_gpu.data.tokens import TokenSource
from cllm_gpu.utils.errors import UserError

_SPLIT_NAME = re.compile(r"(train|val)\.bin")
"""nanoGPT's files, which begin with no magic number."""


@dataclass(frozen=True)
class Dataset:
    """An open, verified data set of tokens.

    tokenizer:        None for llm.c shards if no tokenizer was given
    vocabulary:       vocabulary size; every token id is below it
    bytes_per_token:  UTF-8 bytes of the validation text per token, for bits per byte; None if unknown
    skipped_files:    number of files of the source skipped because they are not text
    lost:             fraction of the characters of a sample of the text that its tokens do not reproduce; None if there
                      is no text
    notes:            messages about the text
    """

    train: TokenSource
    validation: TokenSource
    tokenizer: Tokenizer | None
    vocabulary: int
    bytes_per_token: float | None
    skipped_files: int = 0
    lost: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Identifies the data: the lengths, and the checksums if the sources have them."""
        return "/".join(f"{len(part)} {part.digest}".strip() for part in (self.train, self.validation))


def open_dataset(
    source: str,
    *,
    tokenizer: str | Tokenizer,
    validation_fraction: float,
    seed: int,
    cache_folder: Path,
    context: int,
    progress: Progress | None = None,
    options: TextOptions | None = None,
    validation: str | None = None,
    dtype: str | None = None,
) -> Dataset:
    """Open `source`; prepares its shards in `cache_folder` unless they are there.

    source:     "stdlib" (the standard library's .py files), "patterns", a file of text or records (JSON Lines, JSON,
                CSV, Parquet; compressed or not), a folder of them, a glob, a folder with prepared shards, or .bin files
                of token ids (file, folder or glob)
    tokenizer:  a tokenizer or its name (see `load_tokenizer`); "bytes" means none for llm.c shards
    context:    window length in tokens; a training part shorter than one window is an error
    options:    how texts are read (None: unchanged)
    validation: a source like `source`, all of it for validation (None: a fraction of `source`)
    dtype:      "uint16" or "uint32": .bin files are bare token ids, as nanoGPT writes them (None: llm.c's shards)
    progress:   called with (bytes done, total bytes) while text is prepared
    Raises UserError for anything wrong with the source.
    """
    require_fraction(validation_fraction)
    if (found := _llmc_files(source)) is not None:
        held_out = _validation_files(validation)
        dataset = _open_llmc_dataset(source, found, tokenizer, validation_fraction, held_out, dtype)
    else:
        chosen = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        if dtype is not None:
            raise UserError(f"data.dtype is for .bin files of token ids; {source} is none")
        if source == "patterns" or _shard_folder(source) is not None:
            _require_no_validation(source, validation)
        if source == "patterns":
            dataset = _open_patterns(chosen, seed)
        elif (folder := _shard_folder(source)) is not None:
            dataset = open_prepared(folder, chosen, source)
        else:
            corpus = find_corpus(source, options)
            if validation is not None:
                corpus.held_out = text_corpus(validation, options)
            folder, identity = prepared_folder(
                *(corpus, chosen), fraction=validation_fraction, seed=seed, cache=cache_folder, progress=progress
            )
            dataset = _with_remarks(open_prepared(folder, chosen, corpus.name, identity), corpus, chosen)
    require_length(dataset.train, context)
    require_length(dataset.validation, 1)
    return dataset


def _require_no_validation(source: str, validation: str | None) -> None:
    if validation is not None:
        raise UserError(f"data.validation is {validation!r}, but {source} has its own validation part: leave it out")


def _validation_files(validation: str | None) -> list[Path]:
    """The .bin files of the validation source; none if there is none."""
    if validation is None:
        return []
    found = _llmc_files(validation)
    if found is None:
        raise UserError(f"data.validation is {validation!r}, which is no .bin file of token ids like data.source")
    return found


def _notes(sample: list[str], options: TextOptions) -> tuple[str, ...]:
    """The message about a text that contains an end of text written out."""
    for mark in END_OF_TEXT_NAMES[:1] if options.separator is None else ():
        if count := sum(text.count(mark) for text in sample):
            times = f"{count} times" if count > 1 else "once"
            return (f"{mark} stands in a sample of the text {times}, read as plain text; documents end there with "
                    f"--data.separator '{mark}'",)  # fmt: skip
    return ()


def text_corpus(source: str, options: TextOptions | None = None) -> Corpus:
    """`find_corpus` for commands that need text. Raises UserError for a source that consists of tokens."""
    if source == "patterns":
        raise UserError("patterns is not a text: its letters are generated as tokens, for --data.tokenizer patterns")
    if _llmc_files(source) is not None or _shard_folder(source) is not None:
        raise UserError(f"{source} holds tokens, not text: give the text they were made from")
    return find_corpus(source, options)


def open_prepared(folder: Path, tokenizer: Tokenizer, name: str, identity: bytes | None = None) -> Dataset:
    """Open and verify the two shards of `folder`.

    Raises UserError if they were made with another tokenizer, or do not belong together.
    """
    opened = {part: open_shard(folder / SHARD_NAMES[part]) for part in Part}
    headers: dict[Part, ShardHeader] = {part: header for part, (header, _) in opened.items()}
    for part, header in headers.items():
        if header.fingerprint.hex() not in (tokenizer.fingerprint, *tokenizer.earlier_fingerprints):
            found = tokenizer_label(header.tokenizer, header.fingerprint.hex())
            raise UserError(
                f"{folder / SHARD_NAMES[part]} was made with another tokenizer: {found}, here it is "
                f"{tokenizer_label(tokenizer.name, tokenizer.fingerprint)}; give that one, or prepare the text again"
            )
        if header.end_of_text != tokenizer.end_of_text:
            raise UserError(
                f"{folder / SHARD_NAMES[part]} ends its documents with token {header.end_of_text}, "
                f"{tokenizer.name} with {tokenizer.end_of_text}: name the first with --data.end-of-text, "
                "or prepare the text again"
            )
        if header.part != part or header.identity != (identity or headers[Part.TRAIN].identity):
            raise UserError(
                f"{folder / SHARD_NAMES[part]} belongs to another set: move {folder} away and prepare again"
            )
    train, validation = (
        TokenSource(
            f"{name} ({part.name.lower()})",
            [tokens],
            vocabulary=header.vocabulary,
            text_bytes=header.text_bytes,
            documents=header.documents,
            digest=header.checksum.hex(),
        )
        for part, (header, tokens) in opened.items()
    )
    skipped = headers[Part.TRAIN].skipped
    return Dataset(train, validation, tokenizer, tokenizer.vocabulary, validation.bytes_per_token, skipped)


def reopen_prepared(
    source: str,
    tokenizer: Tokenizer,
    *,
    identity: str,
    fraction: float,
    seed: int,
    cache: Path,
    options: TextOptions | None = None,
    validation: str | None = None,
) -> tuple[Dataset, str | None] | None:
    """The dataset of `identity` from `cache`, whatever became of `source`, and a line if that is gone or has changed.

    None if the cache has it not, as for sources that are no text: they are opened anew.
    """
    found = prepared_with(cache, identity)
    if found is None:
        return None
    folder, made_from = found
    dataset = open_prepared(folder, tokenizer, source)
    try:
        corpus = text_corpus(source, options)
        if validation is not None:
            corpus.held_out = text_corpus(validation, options)
        if corpus_identity(corpus, tokenizer, fraction, seed) == made_from:
            return _with_remarks(dataset, corpus, tokenizer), None
        line = f"{source}{f' or {validation}' if validation else ''} has changed since the run began"
    except UserError as error:
        line = str(error)
    return dataset, f"{line}: training goes on with the tokens prepared from it then, in {folder}"


def _with_remarks(dataset: Dataset, corpus: Corpus, tokenizer: Tokenizer) -> Dataset:
    """The dataset with what a sample of its text shows: see `lost` and `notes` of Dataset."""
    sample = corpus.sample()
    return dataclasses.replace(dataset, lost=lost_share(tokenizer, sample), notes=_notes(sample, corpus.options))


def _open_patterns(tokenizer: Tokenizer, seed: int) -> Dataset:
    train, validation = (
        patterns.pattern_source(f"patterns ({part.name.lower()})", tokenizer, documents=count, seed=seed, part=part)
        for part, count in ((Part.TRAIN, patterns.TRAINING_DOCUMENTS), (Part.VALIDATION, patterns.VALIDATION_DOCUMENTS))
    )
    return Dataset(train, validation, tokenizer, tokenizer.vocabulary, None)


def _open_llmc_dataset(
    source: str,
    paths: list[Path],
    tokenizer: str | Tokenizer,
    fraction: float,
    validation_files: list[Path],
    dtype: str | None,
) -> Dataset:
    chosen = load_tokenizer(tokenizer) if isinstance(tokenizer, str) and tokenizer != "bytes" else None
    if not isinstance(tokenizer, str):
        chosen = tokenizer
    vocabulary = chosen.vocabulary if chosen else None
    train, validation = open_llmc(
        source, paths, fraction=fraction, vocabulary=vocabulary, held_out=validation_files, dtype=dtype
    )
    return Dataset(train, validation, chosen, train.vocabulary, None)


def _shard_folder(source: str) -> Path | None:
    """The folder of prepared shards, if `source` is such a folder or a shard in it; else None."""
    path = Path(os.path.expanduser(source))
    if path.is_dir() and any((path / name).exists() for name in SHARD_NAMES.values()):
        return path
    if path.is_file() and is_shard(path):
        return path.parent
    return None


def _llmc_files(source: str) -> list[Path] | None:
    """The .bin files that `source` names; None if it names anything else."""
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return [path] if path.suffix == ".bin" or is_llmc(path) else None
    if path.is_dir():
        found = sorted(path.glob("*.bin"))
        known = [is_llmc(file) or _SPLIT_NAME.fullmatch(file.name) is not None for file in found]
        return found if found and all(known) else None
    if glob.has_magic(source) and source.endswith(".bin"):
        return [Path(match) for match in sorted(glob.glob(os.path.expanduser(source), recursive=True))] or None
    return None
