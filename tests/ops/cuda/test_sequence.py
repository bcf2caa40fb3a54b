"""Embedding, dropout and rotary against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.ops.cuda.embedding import SEGMENT, embedding_backward, embedding_forward
from cllm_gpu.ops.cuda.rotary import rotary_backward, rotary_forward
from cllm_gpu.ops.reference import embedding as reference_embedding
from cllm_gpu.ops.reference import rotary as reference_rotary
from tests.ops.cuda.comparison import close, tied_dropout
from tests.ops.cuda.devices import DTYPES, Device


def _draw(rng: np.random.Generator, storage: str, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32).astype(DTYPES[storage])


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 24, 33])
@pytest.mark.parametrize("positions", [True, False])
def test_embedding_forward(device: Device, rng: Any, storage: str, width: int, positions: bool) -> None:
    tokens = rng.integers(0, 11, (3, 5)).astype(np.int32)
    table, learned = _draw(rng, storage, 11, width), _draw(rng, storage, 9, width) if positions else None
    out = device.put(np.zeros((15, width), table.dtype))
    put_learned = None if learned is None else device.put(learned)
    embedding_forward(device.launcher, device.put(tokens), device.put(table), put_learned, out, first_position=4)
    want = np.empty((15, width))
    wide = None if learned is None else learned.astype(np.float64)
    reference_embedding.embedding_forward(np, tokens, table.astype(np.float64), wide, want, first_position=4)
    close("out", device.get(out), want, storage=storage, factor=1)


# one by one; packs that begin inside an evaluation of four; several blocks
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 7, 8, 12, 120])
@pytest.mark.parametrize("first_element", [0, 1, 6, 2**33 + 3])
def test_embedding_and_dropout_have_the_references_bits(
    device: Device, rng: Any, storage: str, width: int, first_element: int
) -> None:
    """Of float32 inside: in bfloat16 the sum is not rounded before the mask."""
    dropout = tied_dropout(seed=2**63 + 12345, step=2**31 + 5, site=4, first_element=first_element)
    tokens = rng.integers(0, 11, (2, 23)).astype(np.int32)
    tables = _draw(rng, storage, 11, width), _draw(rng, storage, 23, width)
    out, want = device.put(np.zeros((46, width), DTYPES[storage])), np.empty((46, width), np.float32)
    embedding_forward(device.launcher, device.put(tokens), *map(device.put, tables), out, dropout=dropout)
    wide = [table.astype(np.float32) for table in tables]
    reference_embedding.embedding_forward(np, tokens, *wide, want, dropout=dropout)
    assert np.array_equal(device.get(out), want.astype(DTYPES[storage]))
    assert want.reshape(-1)[0] != 0.0, "its word is the threshold itself"
    assert width == 1 or 0 < np.count_nonzero(want) < want.size


# tokens from V ids over (B, T): none repeated; runs inside segments; runs over many segments; one run over all
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize(("vocabulary", "batch", "length"), [(50, 1, 1), (40, 3, 50), (3, 4, 129), (1, 2, 128)])
@pytest.mark.parametrize("width", [8, 300])
@pytest.mark.parametrize("accumulate", [True, False])
def test_embedding_backward(
    device: Device, rng: Any, storage: str, vocabulary: int, batch: int, length: int, width: int, accumulate: bool
) -> None:
    tokens = rng.integers(0, vocabulary, (batch, length)).astype(np.int32)
    dout = _draw(rng, storage, batch * length, width)
    old_tokens, old_positions = _draw(rng, storage, vocabulary, width), _draw(rng, storage, length + 2, width)
    got = device.put(old_tokens), device.put(old_positions)
    options = {"accumulate_tokens": accumulate, "accumulate_positions": accumulate}
    embedding_backward(device.launcher, device.put(dout), device.put(tokens), *got, **options)
    wants = old_tokens.astype(np.float64), old_positions.astype(np.float64)
    reference_embedding.embedding_backward(np, dout.astype(np.float64), tokens, *wants, **options)
    close("tokens", device.get(got[0]), wants[0], storage=storage, factor=4 + batch * length)
    close("positions", device.get(got[1]), wants[1], storage=storage, factor=4 + batch)
    again = device.put(old_tokens), device.put(old_positions)
    order = device.put(np.argsort(tokens.reshape(-1), kind="stable"))
    embedding_backward(device.launcher, device.put(dout), device.put(tokens), *again, order=order, **options)
    assert np.array_equal(device.get(again[0]), device.get(got[0])), "sorted by the caller"


# lengths of the runs of equal tokens, in sorted order; segments are of 64
@pytest.mark.parametrize(
    "runs",
    [
        (64, 66, 5),  # one starts where a segment does, fills it and goes on
        (63, 2, 70),  # one starts at a segment's last position and ends one past it
        (10, 119, 61),  # one fills a segment and ends one past it
        (63, 64),  # one runs to the end, one position short of the segment's
        (63,),
    ],
    ids=str,
)
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_runs_that_meet_the_ends_of_segments(device: Device, rng: Any, storage: str, runs: tuple[int, ...]) -> None:
    assert SEGMENT == 64
    tokens = rng.permutation(np.repeat(np.arange(len(runs), dtype=np.int32), runs))[np.newaxis]
    dout = _draw(rng, storage, sum(runs), 5)
    got, want = device.put(np.full((len(runs), 5), np.nan, dout.dtype)), np.zeros((len(runs), 5))
    options = {"accumulate_tokens": False, "accumulate_positions": False}
    embedding_backward(device.launcher, device.put(dout), device.put(tokens), got, None, **options)
    reference_embedding.embedding_backward(np, dout.astype(np.float64), tokens, want, None, **options)
    close("tokens", device.get(got), want, storage=storage, factor=sum(runs))


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 6, 64])
def test_rotary(device: Device, rng: Any, storage: str, size: int) -> None:
    """On a strided view, with float32 tables, and back again."""
    whole = _draw(rng, storage, 2, 5, 6, size)
    cosine, sine = reference_rotary.rotary_tables(np, 5, size, np.float32)
    memory = device.put(whole)
    rotary_forward(device.launcher, memory[:, :, 2:5], device.put(cosine), device.put(sine))
    want = whole.astype(np.float64)
    reference_rotary.rotary_forward(np, want[:, :, 2:5], cosine.astype(np.float64), sine.astype(np.float64))
    close("rotated", device.get(memory), want, storage=storage, factor=4)
    rotary_backward(device.launcher, memory[:, :, 2:5], device.put(cosine), device.put(sine))
    twice = 1.5 if storage == "bfloat16" else 1.0  # two roundings to bf16, each of a number up to √2 times as large
    error = np.abs(device.get(memory).astype(np.float64) - whole.astype(np.float64)).max()
    assert error <= twice * (2.0**-7 if storage == "bfloat16" else 2.0**-21) * np.abs(whole.astype(np.float64)).max()
