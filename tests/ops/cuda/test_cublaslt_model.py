"""A whole model whose products go through cuBLASLt, on the stand-in of its binding, beside one without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend
from cllm_gpu.devices.logit_chunks import LogitChunks
from cllm_gpu.model.activations import Activations
from cllm_gpu.model.parameters import Layout, initial_values, parameter_specs
from cllm_gpu.model.transformer import Transformer
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.registry import cuda_operations
from cllm_gpu.utils.profiling import Ranges
from tests.gpu.training_runs import Run, tiny_architecture
from tests.ops.cuda.devices import BFLOAT16, simulator_or_skip
from tests.ops.cuda.lt_stand_in import StandIn, launcher_with


def test_a_model_trains_through_it_as_without() -> None:
    """Three AdamW steps of a tiny model in float32: the same mathematics, other roundings."""
    ranges, kernels, losses = Ranges(), simulator_or_skip(), []
    stand_in = StandIn()
    for launcher in (Launcher(np, kernels), launcher_with(stand_in, kernels=kernels)):
        backend = Backend("simulator", np, cuda_operations(launcher, ranges), "products as the test says")
        run = Run(backend, tiny_architecture(layers=1))
        losses.append([run.step() for _ in range(3)])
    # two steps of 3e-3 in the sign of a gradient that may be near zero: 1e-4 of the loss at most
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    forward = ["BIAS", "BIAS", "DEFAULT", "BIAS", "DEFAULT"]  # qkv, projection, up, down, head
    head, mlp, attention = ["DEFAULT"] * 2, ["BGRADB", "DEFAULT", "DEFAULT", "DEFAULT"], ["BGRADB", "DEFAULT"] * 2
    assert stand_in.products == 3 * (forward + head + mlp + attention)


@pytest.mark.parametrize(("chunk", "gradient"), [(None, BFLOAT16), (30, BFLOAT16), (30, np.dtype(np.float32))])
def test_a_bfloat16_model_has_the_gradients_it_has_without(chunk: int | None, gradient: Any) -> None:
    """Forward and backward of the tiny model: every layer's products, with GELU and every bias inside them.

    With chunks of logits the head's gradient is a float32 product of bf16 factors, added to from chunk to chunk; where
    micro-batches add to them, all gradients are float32. Both round to bf16, the epilogues less often: by the reasons
    of test_loss_and_gradients_in_bfloat16, 2%.
    """
    stand_in, found = StandIn(), []
    architecture = tiny_architecture(layers=2)
    layout = Layout(parameter_specs(architecture), BFLOAT16)
    draws = np.random.default_rng(5).integers(0, 97, (2, 3, 24)).astype(np.int32)
    kernels = simulator_or_skip()
    for launcher in (Launcher(np, kernels), launcher_with(stand_in, kernels=kernels)):
        chunks = LogitChunks(1 << 30, chunk)
        ops = cuda_operations(launcher, Ranges())
        backend = Backend("simulator", np, ops, "products as the test says", logit_chunks=chunks)
        flat, gradients = (backend.zeros(layout.size, dtype) for dtype in (BFLOAT16, gradient))
        flat[...] = initial_values(layout, 1)
        workspace = Activations(architecture, backend, 3, 24, BFLOAT16, training=True, gradient_dtype=gradient)
        loss = Transformer(architecture, backend, layout.views(flat)).loss_and_gradients(
            workspace, *draws, layout.views(gradients), gradient_scale=1.0 / 72, accumulate=False
        )
        found.append((loss, gradients.astype(np.float64)))
    (want_loss, want), (loss, got) = found
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    print(f"loss {loss:.5f}, without {want_loss:.5f}; gradients differ by {error:.2%}")
    assert abs(loss - want_loss) <= 2.0**-9 * want_loss
    assert error <= 0.02
    assert (workspace["head"].dhead is None) is (chunk is None or gradient != BFLOAT16)
    assert stand_in.products.count("GELU_AUX_BIAS") == 2
    # a bias's gradient comes with dhidden only in dhidden's dtype, else with the product after it
    assert stand_in.products.count("DGELU_BGRAD" if gradient == BFLOAT16 else "DGELU") == 2
    assert stand_in.products.count("BGRADB") == (6 if gradient == BFLOAT16 else 8)
