"""Philox4x32-10 against the known-answer vectors its authors publish (Random123, tests/kat_vectors)."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.ops.reference.philox import philox4x32, random_words

KNOWN_ANSWERS = [  # counter, key, output
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    words = philox4x32(np, numbers(counter), numbers(key))
    assert tuple(int(word) for word in words) == numbers(output)


def test_words_are_components_of_consecutive_counters():
    words = random_words(np, 0, 8, seed=0, stream=(0, 0))
    assert words.dtype == np.uint32
    assert tuple(int(word) for word in words[:4]) == numbers(KNOWN_ANSWERS[0][2])
    following = philox4x32(np, (1, 0, 0, 0), (0, 0))
    assert [int(word) for word in words[4:]] == [int(word) for word in following]


@pytest.mark.parametrize("first", [0, 1, 5, 1021, 2**34 - 7, 2**40 + 3])
def test_a_word_depends_on_its_index_alone(first):
    """The same sequence from any start in pieces of any length; the counter's low word carries at index 2^34."""
    whole = random_words(np, first, 23, seed=99, stream=(3, 4))
    pieces = [random_words(np, first + start, 1 + start % 3, seed=99, stream=(3, 4)) for start in range(20)]
    for start, piece in enumerate(pieces):
        np.testing.assert_array_equal(piece, whole[start : start + piece.size])


def test_counter_and_key_are_split_into_low_and_high_words():
    words = random_words(np, 4 * (2**32 * 3 + 5), 4, seed=2**32 * 7 + 6, stream=(8, 9))
    assert list(words) == [int(word) for word in philox4x32(np, (5, 3, 8, 9), (6, 7))]


def test_seed_and_both_stream_words_matter():
    drawn = {
        random_words(np, 0, 4, seed=seed, stream=stream).tobytes()
        for seed in (1, 2, 1 + 2**32, 2**64 - 1)
        for stream in ((0, 0), (0, 1), (1, 0), (2**32 - 1, 7))
    }
    assert len(drawn) == 16


def test_no_words():
    assert random_words(np, 5, 0, seed=1, stream=(0, 0)).size == 0
