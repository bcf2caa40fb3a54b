"""A model exported and imported again is the same bit for bit, in every form in which such folders are found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cllm_gpu.checkpoint.checkpoint import load_model
from cllm_gpu.checkpoint.safetensors_io import read_tensors, write_tensors
from cllm_gpu.config import ModelConfig
from cllm_gpu.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    PatternTokenizer,
    Tokenizer,
    tokenizer_from_dict,
)
from cllm_gpu.huggingface import export_model, import_model
from cllm_gpu.huggingface.gpt2_mapping import read_config, require_exportable
from cllm_gpu.model.architecture import Architecture, LatticeTerms
from cllm_gpu.utils.errors import UserError

SHAPE = Architecture(vocabulary=300, context=16, layers=2, heads=2, kv_heads=2, width=16, mlp_width=64)
CHANGES: list[dict[str, Any]] = [{}, {"tied_head": False}, {"mlp_width": 40, "heads": 4, "kv_heads": 4}]
TEXT = "The number 7 is 49.\n\ttabs, é and 日本 <|endoftext|>"


def same_bits(found: Any, expected: Any) -> bool:
    assert set(found) == set(expected)
    return all(found[name].tobytes() == np.ascontiguousarray(expected[name]).tobytes() for name in expected)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Other tensors in its model.safetensors."""
    write_tensors(folder / "model.safetensors", change(read_tensors(folder / "model.safetensors")))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_round_trip(build_model: Any, tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any]) -> None:
    architecture = dataclasses.replace(SHAPE, dropout=0.1, **changes)
    model, _ = build_model(architecture, np.float32)
    assert export_model(model, tokenizer, tmp_path / "out") == ()
    found = import_model(tmp_path / "out")
    assert found.architecture == architecture
    assert found.notes == ()
    assert found.checkpoint.step == 0
    assert same_bits(found.checkpoint.parameters, model.parameters)
    assert found.tokenizer is not None
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    assert type(found.tokenizer) is type(tokenizer)


def test_weights_are_stored_transposed_and_named_as_gpt2s(build_model: Any, exported: Path) -> None:
    tensors = read_tensors(exported / "model.safetensors")
    model, _ = build_model(dataclasses.replace(SHAPE, vocabulary=257), np.float32)
    qkv = tensors["transformer.h.1.attn.c_attn.weight"]
    assert qkv.shape == (16, 48)
    assert np.array_equal(qkv, model.parameters["blocks.1.qkv.weight"].T)
    assert np.array_equal(tensors["transformer.ln_f.bias"], model.parameters["final_norm.bias"])
    assert "lm_head.weight" not in tensors


def without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("transformer."): array for name, array in tensors.items()}


def with_masks(tensors: dict[str, Any]) -> dict[str, Any]:
    masks = {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.uint8)) for n in range(2)}
    return without_prefix(tensors) | masks | {"h.0.attn.masked_bias": np.float32(-1e4).reshape(())}


def with_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@pytest.mark.parametrize("change", [without_prefix, with_masks, with_head])
def test_names_as_other_files_have_them(exported: Path, change: Any) -> None:
    expected = import_model(exported).checkpoint.parameters
    rewrite(exported, change)
    assert same_bits(import_model(exported).checkpoint.parameters, expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_narrow_weights_are_widened(exported: Path, dtype: Any) -> None:
    expected = {
        name: np.ascontiguousarray(array).astype(dtype).astype(np.float32)
        for name, array in import_model(exported).checkpoint.parameters.items()
    }
    rewrite(exported, lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()})
    assert same_bits(import_model(exported).checkpoint.parameters, expected)


def shard(folder: Path) -> dict[str, str]:
    """model.safetensors in two parts; the index's weight_map."""
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(tensors)}
    for part in set(parts.values()):
        write_tensors(folder / part, {name: tensors[name] for name in tensors if parts[name] == part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    return parts


def test_parts_listed_in_an_index(exported: Path) -> None:
    expected = import_model(exported).checkpoint.parameters
    parts = shard(exported)
    assert same_bits(import_model(exported).checkpoint.parameters, expected)
    (exported / parts["transformer.wte.weight"]).unlink()
    with pytest.raises(UserError, match=r"cannot read .*-of-00002.safetensors"):
        import_model(exported)


@pytest.mark.parametrize("name", ["../model.safetensors", "a/b.safetensors", 3])
def test_an_index_names_files_beside_it(exported: Path, name: Any) -> None:
    shard(exported)
    (exported / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match="has no weight_map"):
        import_model(exported)


def test_vocabulary_and_merges(exported: Path, bpe: HuggingFaceTokenizer, change_config: Any) -> None:
    settings = json.loads(bpe.as_dict()["json"])["model"]
    (exported / "tokenizer.json").unlink()
    (exported / "vocab.json").write_text(json.dumps(settings["vocab"]))
    with pytest.raises(UserError, match=r"vocab.json has no merges.txt beside it"):
        import_model(exported)
    merges = (" ".join(pair) for pair in settings["merges"])
    (exported / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"has {bpe.vocabulary} ids, vocab_size in .* is 257"):
        import_model(exported)
    rewrite(exported, lambda tensors: tensors | {"transformer.wte.weight": np.zeros((300, 16), np.float32)})
    change_config(exported, vocab_size=300)
    found = import_model(exported).tokenizer
    assert found is not None
    assert len(settings["merges"]) > 10
    assert found.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert found.end_of_text == bpe.end_of_text
    assert found.decode(found.encode(TEXT)) == TEXT


def test_without_a_tokenizer(exported: Path) -> None:
    (exported / "tokenizer.json").unlink()
    found = import_model(exported)
    assert found.checkpoint.tokenizer == {}
    assert "has no tokenizer.json" in found.notes[0]
    given = import_model(exported, ByteTokenizer())
    assert tokenizer_from_dict(given.checkpoint.tokenizer).fingerprint == ByteTokenizer.fingerprint
    assert given.notes == ()


def test_bytes_keep_their_ids_in_the_library(exported: Path) -> None:
    """Read by the library alone, the exported tokenizer.json gives the ids of our bytes."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    text = TEXT.replace("<|endoftext|>", "")
    assert library.encode(text).ids == list(text.encode())
    assert library.decode(list(text.encode())) == text
    assert library.token_to_id("<|endoftext|>") == 256


def test_dropout_that_has_no_counterpart_is_said(exported: Path, change_config: Any) -> None:
    change_config(exported, resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.3)
    found = import_model(exported)
    assert found.architecture.dropout == 0.2
    assert [note.split(" is ")[0] for note in found.notes] == ["attn_pdrop 0.3", "embd_pdrop 0.1"]


def test_settings_left_out_are_gpt2s() -> None:
    """What transformers' GPT2Config takes them for: the smallest of the released models."""
    architecture, _ = read_config({"model_type": "gpt2"}, "config.json")
    assert architecture == dataclasses.replace(ModelConfig(size="gpt2").architecture(50257), dropout=0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "llama"}, "model type 'llama'; only 'gpt2'"),
        ({"model_type": None}, "model type None"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'; this package supports only 'gelu_new'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; this package supports only 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; .* only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; .* only True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_layer": 0}, "n_layer is 0; it must be a whole number of at least 1"),
        ({"n_embd": 16.5}, "n_embd is 16.5"),
        ({"n_inner": "x"}, "n_inner is 'x'"),
        ({"n_head": 3}, "config.json: model.heads is 3, which does not divide"),
        ({"resid_pdrop": 1}, "resid_pdrop is 1"),
        ({"n_layer": 3}, "h.2.ln_1.weight is missing from model.safetensors"),
        ({"n_layer": 1}, r"h.1.attn.c_attn.bias \[48\] is not a parameter"),
        ({"n_inner": 32}, r"h.0.mlp.c_fc.* is .*64.*, config.json makes it .*32"),
        ({"n_positions": 8}, r"wpe.weight is \[16, 16\], config.json makes it \[8, 16\]"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_what_is_not_computed_here_is_refused(
    exported: Path, change_config: Any, settings: dict[str, Any], expected: str
) -> None:
    change_config(exported, **settings)
    with pytest.raises(UserError, match=expected) as caught:
        import_model(exported)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t | {"score.weight": np.zeros(3, np.float32)}, r"score.weight \[3\] is not a parameter"),
        (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight differs from wte.weight"),
        (lambda t: {n: t[n] for n in t if "ln_f.bias" not in n}, "ln_f.bias is missing"),
        (lambda t: t | {"transformer.ln_f.bias": np.zeros(16, np.int32)}, "ln_f.bias is int32"),
        (lambda t: t | {"transformer.ln_f.bias": np.zeros(16, np.float64)}, "ln_f.bias is float64"),
        (lambda t: t | {"transformer.ln_f.bias": np.zeros(1, np.float32)}, r"is \[1\], config.json makes it \[16\]"),
    ],
)
def test_tensors_that_do_not_fit(exported: Path, change: Any, expected: str) -> None:
    rewrite(exported, change)
    with pytest.raises(UserError, match=expected):
        import_model(exported)


def test_a_folder_that_is_to_be_imported_first(exported: Path) -> None:
    with pytest.raises(UserError, match="is a model as Hugging Face stores it: read it with `cllm-gpu import"):
        load_model(exported)


def test_files_that_are_missing_or_broken(exported: Path) -> None:
    weights = exported / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is not a safetensors file"):
        import_model(exported)
    weights.rename(exported / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no model.safetensors \(pytorch_model.bin is a pickle"):
        import_model(exported)
    (exported / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        import_model(exported)
    (exported / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json is not a model configuration"):
        import_model(exported)
    with pytest.raises(UserError, match=r"config.json does not exist"):
        import_model(exported / "nowhere")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lattice": LatticeTerms()}, "attention is crystalline, GPT-2 has only standard"),
        ({"positions": "rope"}, "positions is rope, GPT-2 has only learned"),
        ({"kv_heads": 1}, "kv_heads is 1, GPT-2 has only 2"),
        ({"bias": False}, "bias is False, GPT-2 has only True"),
    ],
)
def test_what_gpt2_cannot_express(build_model: Any, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    model, _ = build_model(dataclasses.replace(SHAPE, **changes), np.float32)
    with pytest.raises(UserError, match=expected):
        export_model(model, ByteTokenizer(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gpt2_has_the_default_of_every_setting_it_cannot_name() -> None:
    later = dataclasses.make_dataclass("Later", [("since_then", str, "as before")], bases=(type(SHAPE),), frozen=True)
    values = {f.name: getattr(SHAPE, f.name) for f in dataclasses.fields(SHAPE)}
    require_exportable(later(**values))
    with pytest.raises(UserError, match="since_then is new, GPT-2 has only as before"):
        require_exportable(later(**values, since_then="new"))


def test_letters_have_no_hugging_face_form(build_model: Any, tmp_path: Path) -> None:
    model, _ = build_model(SHAPE, np.float32)
    assert "patterns has no Hugging Face form" in export_model(model, PatternTokenizer(), tmp_path / "out")[0]
    assert "the model has no tokenizer" in export_model(model, None, tmp_path / "other")[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_an_export_replaces_nothing_and_leaves_nothing_behind(
    build_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build_model(SHAPE, np.float32)
    (tmp_path / "empty").mkdir()
    export_model(model, ByteTokenizer(), tmp_path / "empty")
    with pytest.raises(UserError, match="exists already and is not empty"):
        export_model(model, ByteTokenizer(), tmp_path / "empty")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="exists already"):
        export_model(model, ByteTokenizer(), tmp_path / "file")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cllm_gpu.huggingface.exporting.write_tensors", full)
    with pytest.raises(UserError, match="no space left"):
        export_model(model, ByteTokenizer(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_an_exported_tokenizer_adds_nothing(build_model: Any, bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    """A post-processor that training never applied is left out; one that prompts were given at import stays."""
    import tokenizers

    settings = json.loads(bpe.as_dict()["json"])
    end = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [bpe.end_of_text], "tokens": ["<|endoftext|>"]}}
    single = [end, {"Sequence": {"id": "A", "type_id": 0}}]
    settings["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special,
    }  # fmt: skip
    trained = HuggingFaceTokenizer(json.dumps(settings), "t")
    model, _ = build_model(SHAPE, np.float32)
    export_model(model, trained, tmp_path / "out")
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode("the cat").ids == trained.encode("the cat").tolist()
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(settings))
    found = import_model(tmp_path / "out").tokenizer
    assert found is not None
    assert found.prefix == (bpe.end_of_text,)
    assert tokenizer_from_dict(found.as_dict()).prefix == found.prefix
    export_model(model, found, tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    assert again.encode("the cat").ids == [bpe.end_of_text, *trained.encode("the cat").tolist()]


def test_ids_that_no_token_has_are_suppressed(build_model: Any, bpe: HuggingFaceTokenizer, tmp_path: Path) -> None:
    model, _ = build_model(dataclasses.replace(SHAPE, vocabulary=bpe.vocabulary + 3), np.float32)
    export_model(model, bpe, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["suppress_tokens"] == [bpe.vocabulary, bpe.vocabulary + 1, bpe.vocabulary + 2]
    assert written["eos_token_id"] == [bpe.end_of_text]
