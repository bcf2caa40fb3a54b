"""Folders that transformers wrote, read here, and folders written here, loaded by transformers: the same logits.

Bound: 1e-5 of the norm of the logits in float32, whose rounding through three layers is some 1e-6.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import get_backend
from cllm_gpu.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from cllm_gpu.huggingface import export_model, import_model
from cllm_gpu.huggingface.gpt2_mapping import read_config
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.parameters import Layout, parameter_specs
from cllm_gpu.model.transformer import Transformer

pytestmark = pytest.mark.witness

A = Architecture(vocabulary=300, context=24, layers=3, heads=4, kv_heads=4, width=40, mlp_width=160)
BOUND = 1e-5
TEXT = "The number 7 is 49.\n\n   tabs,\té and 日本"


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    """A byte-level BPE in a tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["The number 7 is 49.\nThe cat sat.\n"] * 20, trainer)
    made.save(str(tmp_path / "bpe.json"))
    return load_tokenizer(str(tmp_path / "bpe.json"))


def tokens_of(architecture: Architecture) -> Any:
    shape = (2, architecture.context)
    return np.random.default_rng(1).integers(architecture.vocabulary, size=shape, dtype=np.int32)


def our_logits(model: Transformer, tokens: Any) -> Any:
    activations = Activations(model.architecture, model.backend, *tokens.shape, np.float32, training=False)
    return model.logits(activations, tokens)


def their_logits(torch: Any, witness: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return witness(torch.from_numpy(tokens).long()).logits.float().numpy()


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def random_gpt2(transformers: Any, torch: Any, **settings: Any) -> Any:
    """A GPT2LMHeadModel with biases and gains away from 0 and 1."""
    config = transformers.GPT2Config(
        vocab_size=A.vocabulary, n_positions=A.context, n_embd=A.width, n_layer=A.layers, n_head=A.heads,
        bos_token_id=0, eos_token_id=0, **settings,
    )  # fmt: skip
    witness = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in witness.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return witness


def opened(folder: Path) -> Transformer:
    """The model that an import gives."""
    found = import_model(folder)
    backend = get_backend("numpy", workers=1)
    layout = Layout(parameter_specs(found.architecture), np.float32)
    parameters = layout.views(np.zeros(layout.size, np.float32))
    for name, view in parameters.items():
        view[...] = found.checkpoint.parameters[name]
    return Transformer(found.architecture, backend, parameters)


@pytest.mark.parametrize(
    "settings",
    [{}, {"n_inner": 96, "activation_function": "gelu_pytorch_tanh"}, {"tie_word_embeddings": False}],
    ids=["gpt2", "narrow", "untied"],
)
def test_import(transformers: Any, torch: Any, tmp_path: Path, within: Any, settings: dict[str, Any]) -> None:
    witness = random_gpt2(transformers, torch, **settings)
    witness.save_pretrained(tmp_path / "model")
    tokens = tokens_of(A)
    found = our_logits(opened(tmp_path / "model"), tokens)
    within("logits", error(found, their_logits(torch, witness, tokens)), BOUND)


def test_import_in_parts_and_bfloat16(transformers: Any, torch: Any, tmp_path: Path, within: Any) -> None:
    witness = random_gpt2(transformers, torch).to(torch.bfloat16)
    witness.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    tokens = tokens_of(A)
    found = our_logits(opened(tmp_path / "model"), tokens)
    within("logits", error(found, their_logits(torch, witness.float(), tokens)), BOUND)


@pytest.mark.parametrize("changes", [{}, {"tied_head": False, "mlp_width": 96}], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_export(
    build_model: Any,
    transformers: Any,
    torch: Any,
    tmp_path: Path,
    within: Any,
    bpe: Tokenizer,
    changes: Any,
    kind: str,
) -> None:
    a = dataclasses.replace(A, **changes)
    model, _ = build_model(a, np.float32)
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    export_model(model, tokenizer, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a third party warns of is not ours to mend
        witness, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert not any(report.values()), report
    assert witness.dtype == torch.float32
    tokens = tokens_of(a)
    within("logits", error(their_logits(torch, witness.eval(), tokens), our_logits(model, tokens)), BOUND)

    ids = theirs(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT).tolist()
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text == witness.config.eos_token_id
    assert theirs.model_max_length == a.context


def test_both_continue_a_text_alike(build_model: Any, transformers: Any, torch: Any, tmp_path: Path) -> None:
    """Greedy generation by transformers from an export, token by token as here."""
    from cllm_gpu.inference.generate import generate_tokens
    from cllm_gpu.inference.sampling import Sampler

    model, _ = build_model(A, np.float32)
    export_model(model, ByteTokenizer(), tmp_path / "out")
    witness = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    prompt = np.arange(65, 70)
    ours = list(generate_tokens(model, prompt, tokens=12, sampler=Sampler(temperature=0.0), stop=256))
    ids = torch.from_numpy(prompt)[None]
    theirs = witness.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=256
    )[0, 5:].tolist()
    assert len(ours) > 3
    assert theirs[: len(ours)] == ours


def test_the_defaults_of_the_configuration(transformers: Any) -> None:
    """A config.json that says nothing but its type is to both the same model."""
    theirs = transformers.GPT2Config()
    a, _ = read_config({"model_type": "gpt2"}, "config.json")
    assert (a.vocabulary, a.context, a.width) == (theirs.vocab_size, theirs.n_positions, theirs.n_embd)
    assert (a.layers, a.heads, a.dropout) == (theirs.n_layer, theirs.n_head, theirs.resid_pdrop)
    assert read_config(theirs.to_dict(), "config.json")[0] == a


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_what_transformers_saves_is_the_same_tokenizer(
    build_model: Any, transformers: Any, bpe: Tokenizer, kind: str, tmp_path: Path
) -> None:
    """An export, loaded and saved by transformers, is imported with the fingerprint it had."""
    model, _ = build_model(A, np.float32)
    tokenizer = bpe if kind == "bpe" else ByteTokenizer()
    export_model(model, tokenizer, tmp_path / "out")
    for part in (transformers.GPT2LMHeadModel, transformers.AutoTokenizer):
        part.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")
    found = import_model(tmp_path / "saved").tokenizer
    assert found is not None
    assert (found.fingerprint, found.ends) == (tokenizer.fingerprint, tokenizer.ends)


def test_transformers_samples_no_id_without_a_token(
    build_model: Any, transformers: Any, torch: Any, tmp_path: Path
) -> None:
    """The vocabulary is filled up to 300, the bytes have 257 ids."""
    model, _ = build_model(A, np.float32)
    model.parameters["final_norm.bias"][...] = 5
    model.parameters["token_embedding"][257:] = 1  # by far the likeliest
    export_model(model, ByteTokenizer(), tmp_path / "out")
    witness = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(65, 70)[None]
    torch.manual_seed(1)
    mask = torch.ones_like(ids)
    drawn = witness.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=True, pad_token_id=256)
    assert int(drawn.max()) < 257
    assert int(witness(ids).logits[0, -1].argmax()) >= 257
