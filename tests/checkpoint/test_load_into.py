"""A checkpoint's arrays go into the model they belong to, and into no other."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401 (makes NumPy know "bfloat16")
import numpy as np
import pytest

from cllm_gpu.backend import Backend
from cllm_gpu.checkpoint.load_into import match_parameters, require_architecture
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.model.layers.layer import ParameterSpec
from cllm_gpu.model.parameters import FlatParameters, Layout, parameter_specs
from cllm_gpu.utils.errors import UserError

ARCHITECTURE = {"vocabulary": 11, "context": 4, "layers": 1, "heads": 2, "kv_heads": 2, "width": 8, "mlp_width": 16}


def flat(dtype: Any = np.float32, **changes: Any) -> FlatParameters:
    layout = Layout(parameter_specs(Architecture(**(ARCHITECTURE | changes))), dtype)
    return layout.views(np.zeros(layout.size, dtype=layout.dtype))


def filled(generator: np.random.Generator, dtype: Any = np.float32, **changes: Any) -> dict[str, Any]:
    return {name: generator.standard_normal(view.shape).astype(dtype) for name, view in flat(dtype, **changes).items()}


@pytest.mark.parametrize(("stored", "held"), [("float32", "float32"), ("bfloat16", "float32"), ("float32", "float64")])
def test_match_parameters_copies_by_name(
    generator: np.random.Generator, backend: Backend, stored: str, held: str
) -> None:
    arrays, target = filled(generator, stored), flat(held)
    match_parameters(dict(reversed(arrays.items())), target, backend)
    for name, array in arrays.items():
        np.testing.assert_array_equal(target[name], array.astype(held), strict=True)
    assert np.count_nonzero(target.flat) <= target.layout.count  # the padding stays zero


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, r"token_embedding is \[11, 16\] in it, this model needs \[11, 8\]"),
        ({"vocabulary": 12}, r"token_embedding is \[12, 8\] in it, this model needs \[11, 8\]"),
        ({"layers": 2}, r"it has blocks\.1\.qkv\.weight \[24, 8\], this model does not"),
        ({"positions": "rope"}, r"position_embedding \[4, 8\] is missing from it"),
        ({"bias": False}, r"blocks\.0\.attention_norm\.bias \[8\] is missing from it"),
        ({"tied_head": False}, r"it has head \[11, 8\], this model does not"),
        ({"dtype": np.float64}, r"token_embedding is float64 in it, this model holds float32"),
    ],
)
def test_a_checkpoint_of_another_model(
    generator: np.random.Generator, backend: Backend, changes: dict[str, Any], message: str
) -> None:
    target = flat()
    with pytest.raises(UserError, match=f"^the checkpoint is of another model: {message}$"):
        match_parameters(filled(generator, **changes), target, backend)
    assert not target.flat.any()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, None),
        ({"width": 16}, "of another model: width is 16 in it, 8 here"),
        ({"lattice": {"matches": 0}}, "of another model: lattice is .* in it, None here"),
        ({"since_then": "new"}, "describes a model this version does not know: .*since_then"),
    ],
)
def test_the_architecture_must_be_the_same(stored: dict[str, Any], message: str | None) -> None:
    """A field that is not stored is at its default: versions before it had no other."""
    checkpoint: Any = SimpleNamespace(architecture=ARCHITECTURE | stored)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        require_architecture(checkpoint, Architecture(**ARCHITECTURE))


def test_the_first_wrong_array_is_named_even_when_it_comes_last(backend: Backend) -> None:
    layout = Layout([ParameterSpec("a", (2,)), ParameterSpec("b", (3,))], np.float32)
    target = layout.views(np.zeros(layout.size, np.float32))
    with pytest.raises(UserError, match=r"b is \[2\] in it"):
        match_parameters({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, target, backend)
    assert not target.flat.any()
