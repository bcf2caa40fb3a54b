"""GPT-2's logits against transformers' GPT2LMHeadModel with random weights: the architecture is GPT-2's."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.model.activations import Activations
from cllm_gpu.model.architecture import Architecture

pytestmark = pytest.mark.witness

A = Architecture(vocabulary=131, context=24, layers=3, heads=4, kv_heads=4, width=40, mlp_width=160)
NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
LINEARS = {"qkv": "attn.c_attn", "projection": "attn.c_proj", "mlp_up": "mlp.c_fc", "mlp_down": "mlp.c_proj"}


def gpt2(transformers, torch):
    config = transformers.GPT2Config(
        vocab_size=A.vocabulary, n_positions=A.context, n_embd=A.width, n_layer=A.layers, n_head=A.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=1e-5, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains away from 0 and 1
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    return model


def copy_weights(state, parameters):
    """GPT-2's Conv1D keeps (inputs, outputs): the transpose of our (outputs, inputs)."""
    parameters["token_embedding"][...] = state["transformer.wte.weight"]
    parameters["position_embedding"][...] = state["transformer.wpe.weight"]
    for ours, theirs in [("final_norm", "transformer.ln_f")] + [
        (f"blocks.{layer}.{name}", f"transformer.h.{layer}.{other}")
        for layer in range(A.layers)
        for name, other in (NORMS | LINEARS).items()
    ]:
        weight = state[f"{theirs}.weight"].numpy()
        parameters[f"{ours}.weight"][...] = weight.T
        parameters[f"{ours}.bias"][...] = state[f"{theirs}.bias"]


def test_logits(build_model, transformers, torch, within):
    model, _ = build_model(A)
    witness = gpt2(transformers, torch)
    model.parameters.flat[...] = np.nan
    copy_weights(witness.state_dict(), model.parameters)
    tokens = np.random.default_rng(1).integers(A.vocabulary, size=(2, A.context), dtype=np.int32)
    with torch.no_grad():
        expected = witness(torch.from_numpy(tokens).long()).logits.numpy()
    logits = model.logits(Activations(A, model.backend, *tokens.shape, np.float64, training=False), tokens)
    within("logits", float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)), 1e-12)


def test_parameter_count(build_model, transformers, torch):
    model, _ = build_model(A)
    assert model.parameters.layout.count == sum(p.numel() for p in gpt2(transformers, torch).parameters())
