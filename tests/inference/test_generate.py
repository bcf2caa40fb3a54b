"""Generation: the cache against no cache, the sliding window, the end of text, and streaming of UTF-8."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cllm_gpu.backend import get_backend
from cllm_gpu.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from cllm_gpu.inference.generate import CachedReader, TextStream, WindowReader, generate_text, generate_tokens
from cllm_gpu.inference.sampling import Sampler
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.model.gradcheck import random_point
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.text import visible

SHAPE = Architecture(vocabulary=257, context=12, layers=2, heads=4, kv_heads=4, width=24, mlp_width=40)
ARCHITECTURES = {
    "learned": SHAPE,
    "rope": dataclasses.replace(SHAPE, positions="rope", tied_head=False),
    "grouped": dataclasses.replace(SHAPE, kv_heads=2, positions="rope", bias=False),
    "one key head": dataclasses.replace(SHAPE, kv_heads=1),
    "odd context": dataclasses.replace(SHAPE, context=7),
    "context of one": dataclasses.replace(SHAPE, context=1),
    "crystalline": dataclasses.replace(
        SHAPE, lattice=LatticeTerms(matches=4, distance=True, prime_distance=True, symmetry_fraction=0.7)
    ),
}
PROMPT = np.array([5, 200, 31, 0, 77])


def model(architecture, dtype=np.float64):
    backend = get_backend("numpy", workers=1)
    layout = Layout(parameter_specs(architecture), dtype)
    flat = backend.zeros(layout.size, dtype)
    wide = Layout(parameter_specs(architecture), np.float64)
    source, target = wide.views(random_point(wide, seed=2)), layout.views(flat)
    for name in target:
        target[name][...] = source[name]
    return Transformer(architecture, backend, target)


def generated(m, *, use_cache, tokens=40, prompt=PROMPT, stop=None, **settings):
    sampler = Sampler(**{"seed": 9, **settings})
    return list(generate_tokens(m, prompt, tokens=tokens, sampler=sampler, stop=stop, use_cache=use_cache))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 50, "top_p": 0.95}])
def test_the_cache_changes_no_token(name, settings):
    m = model(ARCHITECTURES[name])
    cached, plain = (generated(m, use_cache=use, **settings) for use in (True, False))
    assert len(cached) == 40  # more than three windows
    assert cached == plain
    if settings["temperature"]:  # greedy text soon goes in circles
        assert len(set(cached)) > 10  # an uninteresting text would prove little


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-13), (np.float32, 3e-5)])
def test_the_cache_gives_the_logits_of_the_whole_window(name, dtype, bound):
    """Logits are of size 1; both sides round sums of up to 40 terms in 2 layers, in another order: 100·eps."""
    m = model(ARCHITECTURES[name], dtype)
    cached, plain = CachedReader(m, PROMPT.tolist()), WindowReader(m, PROMPT.tolist())
    for token in np.random.default_rng(4).integers(0, 257, 30).tolist():
        a, b = cached.logits(), plain.logits()
        assert a.dtype == dtype
        error = float(np.abs(a - b).max())
        assert error <= bound, error
        assert cached.window == plain.window
        cached.append(token)
        plain.append(token)


@pytest.mark.parametrize("name", ["learned", "grouped"])
def test_the_window_gives_the_model_s_own_logits(name):
    m = model(ARCHITECTURES[name])
    activations = Activations(m.architecture, m.backend, 1, PROMPT.size, np.float64, training=True)
    expected = m.logits(activations, PROMPT[None].astype(np.int32))[0, -1]
    np.testing.assert_allclose(CachedReader(m, PROMPT.tolist()).logits(), expected, rtol=0, atol=1e-13)


def test_the_window_slides_as_documented():
    m = model(SHAPE)
    reader = WindowReader(m, list(range(20)))
    assert reader.window == list(range(8, 20))  # the last `context` tokens of the prompt
    reader.append(20)
    assert reader.window == list(range(15, 21))  # full: the last context // 2 are kept
    for token in range(21, 27):
        reader.append(token)
    assert reader.window == list(range(15, 27))
    reader.append(27)
    assert reader.window == list(range(22, 28))


def test_the_cache_computes_one_position_per_step_until_the_window_moves(monkeypatch):
    m, computed = model(SHAPE), []
    original = m.next_logits

    def counted(activations, tokens, cache):
        computed.append(tokens.shape[1])
        return original(activations, tokens, cache)

    monkeypatch.setattr(m, "next_logits", counted)
    generated(m, use_cache=True, tokens=16)
    assert computed == [5, *[1] * 7, 6, *[1] * 6, 6]


def test_a_prompt_longer_than_the_context_counts_by_its_end():
    m = model(SHAPE)
    prompt = np.arange(30)
    assert generated(m, use_cache=True, prompt=prompt) == generated(m, use_cache=True, prompt=prompt[-12:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_before_the_stop_token(use_cache):
    m = model(SHAPE)
    tokens = generated(m, use_cache=use_cache)
    stop = tokens[6]
    first = tokens.index(stop)
    assert generated(m, use_cache=use_cache, stop=stop) == tokens[:first]


def test_only_ids_of_the_vocabulary_are_picked():
    m = model(SHAPE)
    sampler = Sampler(temperature=5.0, seed=1)
    picked = list(generate_tokens(m, PROMPT, tokens=40, sampler=sampler, stop=None, vocabulary=7))
    assert len(picked) == 40
    assert max(picked) < 7


def test_zero_tokens_are_none():
    assert generated(model(SHAPE), use_cache=True, tokens=0) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": np.array([], dtype=np.int64)}, "holds no token"),
        ({"prompt": np.array([3, 257])}, "token id 257, outside the model's vocabulary of 257"),
        ({"prompt": np.array([-1])}, "token id -1"),
        ({"tokens": -1}, "-1 tokens cannot be generated"),
        ({"vocabulary": 300}, "the tokenizer has 300 ids, the model 257"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_the_call(arguments, message):
    chosen = {"prompt": PROMPT, "tokens": 3, "sampler": Sampler(), "stop": None, **arguments}
    with pytest.raises(UserError, match=message):
        generate_tokens(model(SHAPE), chosen.pop("prompt"), **chosen)


def test_weights_that_are_not_finite_are_named():
    m = model(SHAPE)
    m.parameters["final_norm.weight"][0] = np.nan
    with pytest.raises(UserError, match="logits are not finite"):
        generated(m, use_cache=True)


# ---- text

TEXT = "aé€😀\ufffd ß日本\n"


def test_a_stream_gives_each_character_when_its_last_byte_comes():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in TEXT.encode()]
    assert "".join(pieces) + stream.flush() == TEXT
    assert pieces[:10] == ["a", "", "é", "", "", "€", "", "", "", "😀"]


@pytest.mark.parametrize("start", range(12))
def test_a_stream_splits_no_character_wherever_it_starts(start):
    """Long enough for the stream to drop what lies behind it several times."""
    text = TEXT * 12
    data = b"x" * start + text.encode()
    stream = TextStream(ByteTokenizer(), before=list(data[:start]))
    out = "".join(stream.push(byte) for byte in data[start:]) + stream.flush()
    assert out == text


@pytest.mark.parametrize(
    ("data", "text"), [(b"a\xe2\x82", "a\ufffd"), (b"\xf0\x9f\x98", "\ufffd"), (b"ok", "ok"), (b"", "")]
)
def test_what_is_left_unfinished_is_flushed_as_a_replacement(data, text):
    stream = TextStream(ByteTokenizer())
    pieces = [stream.push(byte) for byte in data]
    assert "".join(pieces) == text.rstrip("\ufffd")
    assert stream.flush() == text[len("".join(pieces)) :]


def test_random_bytes_stream_to_what_decoding_at_once_gives():
    generator = np.random.default_rng(8)
    for length in [1, 2, 3, 5, 30, 200]:
        data = generator.integers(0, 256, length).tolist()
        stream = TextStream(ByteTokenizer())
        assert "".join(stream.push(x) for x in data) + stream.flush() == ByteTokenizer().decode(data)


def byte_level():
    """A byte-level BPE: tokens may end inside a character."""
    alphabet = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    built = tokenizers.Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return HuggingFaceTokenizer(built.to_str(), "byte level")


def byte_fallback():
    """Words with "▁" for the space before them, and one token per byte for all else, as in Llama 2."""
    words = ["▁the", "▁cat", "s", "▁"]
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {word: 256 + n for n, word in enumerate(words)} | {"</s>": 260}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HuggingFaceTokenizer(built.to_str(), "byte fallback")


def test_a_byte_level_tokenizer_streams_its_text():
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT * 6).tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == TEXT * 6
    assert len([piece for piece in pieces if piece]) >= len(TEXT) * 6 - 12  # the U+FFFD of the text wait for the next


@pytest.mark.parametrize("repeats", [1, 9])
def test_a_tokenizer_that_decodes_words_and_bytes_streams_its_text(repeats):
    """The space before a first word depends on what stands before it; "é" and "€" come in bytes."""
    tokenizer = byte_fallback()
    ids = [256, 257, 258, 259, *"é".encode(), 256, *"€".encode(), 257, *b"x"] * repeats
    stream = TextStream(tokenizer, before=[256])
    pieces = [stream.push(i) for i in ids]
    whole = tokenizer.decode([256, *ids])
    assert whole == "the" + " the cats é the€ catx" * repeats
    assert "the" + "".join(pieces) + stream.flush() == whole
    assert pieces[:8] == [" the", " cat", "s", " ", "", "é", " the", ""]


class JoiningTokenizer:
    """Words that are joined by spaces, and bytes of "é" that decode to U+FFFD until both have come."""

    pieces = ("the", "cat", "sat", b"\xc3", b"\xa9")
    vocabulary, end_of_text = 6, 5

    def encode(self, text):
        return np.array([self.pieces.index(word) for word in text.split()], dtype=np.uint32)

    def decode_bytes(self, ids):
        words = [self.pieces[i] for i in ids]
        groups = ((kind, list(group)) for kind, group in itertools.groupby(words, key=type))
        out = [" ".join(g) if kind is str else b"".join(g).decode(errors="replace") for kind, g in groups]
        return " ".join(out).encode()


def test_a_tokenizer_whose_pieces_depend_on_their_neighbours_streams_the_same_text():
    ids = [0, 1, 3, 4, 2, 0, *[1, 3, 4] * 9, 2]
    stream = TextStream(JoiningTokenizer(), before=[0])
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == " " + JoiningTokenizer().decode_bytes(ids).decode()
    assert pieces[:5] == [" the", " cat", " ", "é", " sat"]


def test_text_is_what_the_tokens_decode_to():
    m, tokenizer = model(SHAPE), ByteTokenizer()
    pieces = list(generate_text(m, tokenizer, "héllo", tokens=60, sampler=Sampler(seed=3)))
    ids = list(generate_tokens(m, tokenizer.encode("héllo"), tokens=60, sampler=Sampler(seed=3), stop=256))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) > 5


def test_text_ends_at_the_end_of_text():
    m = model(SHAPE)
    m.parameters["token_embedding"][256] = 40 * m.parameters["final_norm.bias"]  # the end is by far the likeliest
    assert list(generate_text(m, ByteTokenizer(), "x", tokens=50, sampler=Sampler(temperature=0))) == []


def test_an_empty_prompt_starts_a_document():
    m, tokenizer = model(SHAPE), ByteTokenizer()
    text = "".join(generate_text(m, tokenizer, "", tokens=30, sampler=Sampler(seed=3)))
    ids = generate_tokens(m, np.array([256]), tokens=30, sampler=Sampler(seed=3), stop=256)
    assert text == tokenizer.decode(list(ids))


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(UserError, match="tokenizer has 257 ids, the model 200"):
        generate_text(
            model(dataclasses.replace(SHAPE, vocabulary=200)), ByteTokenizer(), "a", tokens=3, sampler=Sampler()
        )


def test_a_terminal_gets_no_control_characters():
    assert visible("a\x1b[31m\tb\n\x07é\x00") == "a\\x1b[31m\tb\n\\x07é\\x00"
    assert visible("\x9b1m\r\x7f\u202e\u00a0") == "\\x9b1m\\x0d\\x7f\\u202e\u00a0"


def test_every_end_of_text_stops_generation_and_unused_ids_are_not_picked():
    m = model(SHAPE)
    tokens = generated(m, use_cache=True)
    stops = {tokens[6], tokens[4]}
    first = min(tokens.index(stop) for stop in stops)
    assert generated(m, use_cache=True, stop=stops) == tokens[:first]
    unused = range(250)
    picked = generate_tokens(m, PROMPT, tokens=30, sampler=Sampler(seed=1), stop=None, unused=unused)
    assert min(picked) >= 250
