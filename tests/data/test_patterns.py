"""The set `patterns`: what is not masked is determined by what is visible; what is masked is not."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from cllm_gpu.data import IGNORE_INDEX, Batches, evaluation_batches
from cllm_gpu.data.patterns import pattern_documents
from cllm_gpu.utils.errors import UserError


def test_documents_are_arithmetic_and_long_enough() -> None:
    documents = pattern_documents()
    assert len(documents) == len(set(documents)) > 100
    for document in documents:
        steps = set(np.diff([ord(letter) for letter in document]).tolist())
        assert len(document) >= 3
        assert len(steps) == 1


@pytest.mark.parametrize("tokenizer", ["patterns", "bytes"])
def test_two_visible_tokens_determine_every_counted_target(open_source, tokenizer: str) -> None:
    dataset = open_source("patterns", tokenizer=tokenizer, context=48)
    following = defaultdict(set)
    counted = ignored = 0
    batches = Batches(dataset.train, batch=64, context=48, seed=5)
    for tokens, targets in [batches.batch(step) for step in range(10)]:
        real = targets != IGNORE_INDEX
        assert not real[:, 0].any()
        rows, columns = np.nonzero(real)
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            following[tokens[row, column - 1], tokens[row, column]].add(targets[row, column])
        counted, ignored = counted + real.sum(), ignored + (~real).sum()
    assert all(len(targets) == 1 for targets in following.values())
    assert counted > ignored  # most of the loss is about something learnable


def test_one_token_is_not_enough(open_source) -> None:
    dataset = open_source("patterns", tokenizer="patterns")
    tokens, targets = Batches(dataset.train, batch=256, context=48, seed=5).batch(0)
    following = defaultdict(set)
    for token, target in zip(tokens.ravel().tolist(), targets.ravel().tolist(), strict=True):
        if target != IGNORE_INDEX:
            following[token].add(target)
    # only the outermost letters, where documents end, leave few ways to go on
    assert sum(len(targets) > 3 for targets in following.values()) >= 20


def test_the_end_of_text_is_to_be_learnt(open_source) -> None:
    dataset = open_source("patterns", tokenizer="patterns")
    ends = [
        (targets == dataset.tokenizer.end_of_text).sum()
        for _, targets in evaluation_batches(dataset.validation, batch=8, context=64, limit=4)
    ]
    assert min(ends) > 10


def test_train_and_validation_are_drawn_apart_and_by_seed(open_source) -> None:
    one, same, other = (open_source("patterns", tokenizer="patterns", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.train.read(0, 1000), same.train.read(0, 1000))
    assert not np.array_equal(one.train.read(0, 1000), other.train.read(0, 1000))
    assert not np.array_equal(one.train.read(0, 1000), one.validation.read(0, 1000))
    assert one.bytes_per_token is None


def test_a_tokenizer_without_letters_is_refused(open_source, bpe_path) -> None:
    # this one has all 256 bytes as tokens, so single letters do work
    assert open_source("patterns", tokenizer=str(bpe_path)).vocabulary == 276
    text = bpe_path.read_text(encoding="utf-8")
    bpe_path.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'), encoding="utf-8")
    with pytest.raises(UserError, match="one id per letter"):
        open_source("patterns", tokenizer=str(bpe_path))
