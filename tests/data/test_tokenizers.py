"""Tokenizers: lossless, self-contained, and no text can produce the end of text."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_gpu.data.tokenizers import (
    END_OF_TEXT_NAMES,
    ByteTokenizer,
    HuggingFaceTokenizer,
    PatternTokenizer,
    Tokenizer,
    load_tokenizer,
    lost_share,
    require_same_tokenizer,
    tokenizer_from_dict,
)
from cllm_gpu.utils.errors import UserError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(ANY_TEXT)
def test_bytes_are_lossless(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert (ids.dtype, ids.ndim) == (np.uint32, 1)
    assert bytes(ids.astype(np.uint8)) == text.encode()
    assert tokenizer.decode(ids.tolist()) == text
    assert not (ids >= 256).any()


def test_bytes_vocabulary_and_end_of_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocabulary, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode([104, 256, 105, 256]) == "hi"


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    assert ByteTokenizer().decode([0x61, 0xE2, 0x82, 0x62]) == "a\ufffdb"
    assert ByteTokenizer().decode_bytes([0xE2, 0x82]) == b"\xe2\x82"


@pytest.mark.parametrize("bad", [257, -1, 1 << 40])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad} is outside the tokenizer's vocabulary of 257"):
        ByteTokenizer().decode([1, bad])


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(UserError, match=r"lone surrogate U\+DC80 at character 2"):
        ByteTokenizer().encode("ab\udc80")


def test_patterns_letters() -> None:
    tokenizer = PatternTokenizer()
    assert tokenizer.encode("A B\nZ").tolist() == [0, 1, 25]
    assert tokenizer.decode([0, 1, 25, 26]) == "ABZ"
    assert (tokenizer.vocabulary, tokenizer.end_of_text) == (27, 26)
    with pytest.raises(UserError, match="not 'a'"):
        tokenizer.encode("Aa")


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_byte_level_bpe_is_lossless(bpe_json: str, text: str) -> None:
    tokenizer = HuggingFaceTokenizer(bpe_json, "t")
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()


def test_bpe_merges_and_decodes_as_the_library_does(bpe_json: str) -> None:
    import tokenizers

    tokenizer = HuggingFaceTokenizer(bpe_json, "t")
    text = "the cat sat on the mat ✓"
    ids = tokenizer.encode(text)
    library = tokenizers.Tokenizer.from_str(bpe_json)
    assert ids.dtype == np.uint32
    assert len(ids) < len(text.encode())
    assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == library.decode(ids.tolist())
    assert tokenizer.vocabulary == library.get_vocab_size()


def test_many_texts_are_encoded_as_one_by_one(bpe_json: str) -> None:
    texts = ["the cat", "", "sat on the mat\n" * 50, "ABC"]
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(bpe_json, "t")):
        many = tokenizer.encode_many(texts)
        assert [ids.tolist() for ids in many] == [tokenizer.encode(text).tolist() for text in texts]
        assert {ids.dtype for ids in many} == {np.dtype(np.uint32)}
    assert [ids.tolist() for ids in PatternTokenizer().encode_many(["AB", "C"])] == [[0, 1], [2]]


@pytest.mark.parametrize("special", [True, False])
def test_text_cannot_inject_the_end_of_text(bpe_json: str, special: bool) -> None:
    changed = json.loads(bpe_json)
    changed["added_tokens"][0]["special"] = special
    tokenizer = HuggingFaceTokenizer(json.dumps(changed), "t")
    text = "before <|endoftext|> after"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


def test_truncation_and_padding_in_the_file_are_ignored(bpe_json: str) -> None:
    import tokenizers

    changed = tokenizers.Tokenizer.from_str(bpe_json)
    changed.enable_truncation(3)
    changed.enable_padding(length=50)
    text = "the dog on the log, the dog on the log"
    ids = HuggingFaceTokenizer(changed.to_str(), "t").encode(text)
    assert ids.tolist() == HuggingFaceTokenizer(bpe_json, "t").encode(text).tolist()


def test_every_tokenizer_survives_its_dictionary(bpe_path: Path) -> None:
    chosen: list[Tokenizer] = [ByteTokenizer(), PatternTokenizer(), load_tokenizer(str(bpe_path))]
    bpe_path.unlink()  # what a checkpoint stores must not need the file
    for tokenizer in chosen:
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.as_dict())))
        assert (again.fingerprint, again.name) == (tokenizer.fingerprint, tokenizer.name)
        assert (again.vocabulary, again.end_of_text) == (tokenizer.vocabulary, tokenizer.end_of_text)
        assert again.encode("ABC").tolist() == tokenizer.encode("ABC").tolist()
    assert len({tokenizer.fingerprint for tokenizer in chosen}) == 3


def test_a_folder_with_a_tokenizer_json_will_do(bpe_path: Path) -> None:
    assert load_tokenizer(str(bpe_path.parent)).fingerprint == load_tokenizer(str(bpe_path)).fingerprint


def test_bad_tokenizers(tmp_path: Path, bpe_json: str) -> None:
    with pytest.raises(UserError, match="no tokenizer 'gpt9': say bytes, patterns"):
        load_tokenizer("gpt9")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken.json is not JSON"):
        load_tokenizer(str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="has no model"):
        load_tokenizer(str(tmp_path / "other.json"))
    (tmp_path / "latin.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        load_tokenizer(str(tmp_path / "latin.json"))
    (tmp_path / "endless.json").write_text(bpe_json.replace("<|endoftext|>", "<|nothing|>"))
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "endless.json"))
    wrong = json.loads(bpe_json)
    wrong["model"]["merges"] = [["no", "such"]]
    (tmp_path / "merges.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="cannot be read by the library tokenizers"):
        load_tokenizer(str(tmp_path / "merges.json"))
    with pytest.raises(UserError, match="unknown stored tokenizer of kind 'words'"):
        tokenizer_from_dict({"kind": "words"})


def test_a_tokenizer_of_another_kind() -> None:
    """SentencePiece-like: no byte-level alphabet, pieces with a score, "</s>" for the end."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁cat", -1.0), ("▁sat", -1.5), ("s", -2.0), ("▁", -3.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = HuggingFaceTokenizer(made.to_str(), "t")
    ids = tokenizer.encode("cats sat").tolist()
    assert (tokenizer.vocabulary, tokenizer.end_of_text) == (6, 1)
    assert ids == [2, 4, 3]
    assert tokenizer.decode([*ids, 1]) == "cats sat"
    assert tokenizer.decode_bytes(ids) == b"cats sat"


def test_another_tokenizer_is_refused_with_both_names(bpe_json: str) -> None:
    one = HuggingFaceTokenizer(bpe_json, "one.json")
    two = HuggingFaceTokenizer(bpe_json.replace("<|endoftext|>", "</s>"), "one.json")
    require_same_tokenizer(one.as_dict(), one)
    require_same_tokenizer(one.as_dict(), HuggingFaceTokenizer(bpe_json, "moved/one.json"))
    require_same_tokenizer({"kind": "huggingface", "json": bpe_json}, one)  # as stored before names were
    require_same_tokenizer({}, None)
    names = {tokenizer: f"{tokenizer.name} ({tokenizer.fingerprint[:8]})" for tokenizer in (one, two, ByteTokenizer())}
    assert names[one] != names[two]
    for (found, there), (own, here) in itertools.permutations(names.items(), 2):
        with pytest.raises(UserError, match=re.escape(f"another tokenizer: {there}, here it is {here};")):
            require_same_tokenizer(found.as_dict(), own)
    with pytest.raises(UserError, match=re.escape(f"another tokenizer: none, here it is {names[one]};")):
        require_same_tokenizer({}, one)
    with pytest.raises(UserError, match=re.escape(f"another tokenizer: {names[one]}, here it is none;")):
        require_same_tokenizer(one.as_dict(), None)


def test_a_tokenizer_without_end_of_text_says_what_is_accepted(bpe_json: str) -> None:
    with pytest.raises(UserError) as raised:
        HuggingFaceTokenizer(bpe_json.replace("<|endoftext|>", "<|nothing|>"), "mine.json")
    assert str(raised.value).startswith("mine.json has no end-of-text token: one of ")
    assert all(name in str(raised.value) for name in END_OF_TEXT_NAMES)
    assert "\n" not in str(raised.value)


# ---- the end of text, and what lies beside a tokenizer.json


def with_tokens(bpe_json: str, *names: str) -> str:
    """The BPE with further special tokens, numbered from 276 on."""
    changed = json.loads(bpe_json)
    first = 1 + max(changed["model"]["vocab"].values())
    token = changed["added_tokens"][0]
    changed["added_tokens"] += [{**token, "id": first + n, "content": name} for n, name in enumerate(names)]
    return json.dumps(changed)


def test_the_end_of_text_is_what_the_files_beside_say(bpe_json: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(with_tokens(bpe_json, "<|eot_id|>", "<|turn|>", "</s>"))
    by_name = load_tokenizer(str(path))
    assert (by_name.end_of_text, by_name.ends) == (0, (0,))
    assert by_name.notes == (
        "end of text: <|endoftext|> (by its name); not </s> (by its name); --data.end-of-text names another",
    )
    first = by_name.vocabulary - 3
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, first + 1]}))
    generation = load_tokenizer(str(path))
    assert generation.ends == (first, first + 1)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": first + 1}))
    assert load_tokenizer(str(path)).ends == (first + 1, first)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    chosen = load_tokenizer(str(path))
    assert chosen.ends == (first + 2, first + 1, first)
    assert chosen.notes == (
        "end of text: </s> (tokenizer_config.json); not <|turn|> (config.json), <|eot_id|> (generation_config.json), "
        "<|endoftext|> (by its name); --data.end-of-text names another",
    )
    flagged = load_tokenizer(str(path), "<|eot_id|>")
    assert (flagged.ends, flagged.notes) == ((first, first + 2, first + 1), ())
    assert len({one.fingerprint for one in (by_name, generation, chosen)}) == 3
    again = tokenizer_from_dict(json.loads(json.dumps(chosen.as_dict())))
    assert (again.ends, again.fingerprint) == (chosen.ends, chosen.fingerprint)
    assert chosen.decode([*chosen.encode("the cat").tolist(), *chosen.ends]) == "the cat"


def test_an_end_of_text_that_is_no_token_is_refused(bpe_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data.end-of-text is '<end>', which is no token of .*tokenizer.json"):
        load_tokenizer(str(bpe_path), "<end>")
    with pytest.raises(UserError, match=r"names a token of a tokenizer.json; bytes has its own"):
        load_tokenizer("bytes", "</s>")
    (bpe_path.parent / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON .* a tokenizer.json lies beside it"):
        load_tokenizer(str(bpe_path))


def test_one_end_of_text_needs_no_words(bpe_path: Path) -> None:
    (bpe_path.parent / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    found = load_tokenizer(str(bpe_path))
    assert (found.ends, found.notes) == ((0,), ())
    assert "ends" not in found.as_dict()


def test_added_tokens_beside_the_file_are_read(bpe_json: str, bpe_path: Path) -> None:
    folder, known = bpe_path.parent, HuggingFaceTokenizer(bpe_json, "t").vocabulary
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": known}))
    config = {"added_tokens_decoder": {str(known + 1): {"content": "<dog>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(str(bpe_path))
    assert found.vocabulary == known + 2
    assert found.encode("a<cat>b<dog>").tolist()[1] == known
    assert found.decode([known, known + 1]) == "<cat><dog>"
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": 5}))
    with pytest.raises(UserError, match=r"'<cat>' is to have the id 5, which is .* in tokenizer.json"):
        load_tokenizer(str(bpe_path))
    (folder / "added_tokens.json").write_text(json.dumps({"<cat>": known}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"999": {"content": "<dog>"}}}))
    with pytest.raises(UserError, match=r"'<dog>' the id 999, .*: added tokens are numbered behind"):
        load_tokenizer(str(bpe_path))


def test_dropout_of_merges_is_off(bpe_json: str) -> None:
    changed = json.loads(bpe_json)
    changed["model"]["dropout"] = 0.5
    noisy, text = HuggingFaceTokenizer(json.dumps(changed), "t"), "the cat sat on the mat " * 9
    plain = HuggingFaceTokenizer(bpe_json, "t")
    assert {tuple(noisy.encode(text)) for _ in range(5)} == {tuple(plain.encode(text))}
    assert noisy.fingerprint == plain.fingerprint
    assert json.loads(noisy.exported())["model"]["dropout"] is None


def test_byte_level_without_a_decoder_decodes_bytes(bpe_json: str) -> None:
    changed = json.loads(bpe_json)
    changed["decoder"] = None
    tokenizer = HuggingFaceTokenizer(json.dumps(changed), "t")
    assert tokenizer.decode(tokenizer.encode("the cat 語").tolist()) == "the cat 語"


@pytest.mark.parametrize("characters", [True, False])
def test_text_without_a_token_is_named(characters: bool) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "cat": 1, " ": 2, "</s>": 3}))
    splitter = pre_tokenizers.Split("", "isolated") if characters else pre_tokenizers.Whitespace()
    made.pre_tokenizer = splitter
    tokenizer = HuggingFaceTokenizer(made.to_str(), "words.json")
    assert tokenizer.encode("a a").tolist() == ([0, 2, 0] if characters else [0, 0])
    with pytest.raises(UserError) as raised:
        tokenizer.encode("a aéa")
    expected = "the character 'é' (U+00E9)" + ("" if characters else " in 'aéa'")
    assert str(raised.value) == (
        f"words.json has no token for {expected}, and none for unknown ones: give it an unk_token"
    )


def test_fingerprints_are_of_what_maps_text_not_of_how_it_is_written(bpe_json: str) -> None:
    import tokenizers
    from tokenizers import processors

    plain = HuggingFaceTokenizer(bpe_json, "t")
    changed = tokenizers.Tokenizer.from_str(bpe_json)
    changed.enable_truncation(3)
    changed.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    saved = HuggingFaceTokenizer(changed.to_str(pretty=True), "t")
    assert saved.fingerprint == plain.fingerprint
    assert saved.earlier_fingerprints != plain.earlier_fingerprints
    exported = tokenizers.Tokenizer.from_str(saved.exported())
    assert exported.encode("the cat").ids == plain.encode("the cat").tolist()
    assert HuggingFaceTokenizer(changed.to_str(), "t", template=True).prefix == (0,)
    other = json.loads(bpe_json)
    other["normalizer"] = {"type": "Lowercase"}
    assert HuggingFaceTokenizer(json.dumps(other), "t").fingerprint != plain.fingerprint


def test_the_share_of_the_text_that_is_lost(bpe_json: str) -> None:
    changed = json.loads(bpe_json)
    changed["normalizer"] = {"type": "Lowercase"}
    assert lost_share(HuggingFaceTokenizer(bpe_json, "t"), ["The CAT"]) == 0
    assert lost_share(HuggingFaceTokenizer(json.dumps(changed), "t"), ["The CAT", "cat"]) == 4 / 10
