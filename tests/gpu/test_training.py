"""Training on the kernels follows training on NumPy, repeats its bits, and takes no more memory as it goes on."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.ops.precision import BFLOAT16, PRECISIONS
from tests.gpu.training_runs import Run, tiny_architecture
from tests.ops.cuda.devices import simulator_or_skip

STEPS = 20
RELATIVE = 1e-5
"""Of the loss over 20 steps in float32: roundings of a loss near ln 97, grown by the steps before."""
BF16_RELATIVE = 2.0**-8
"""Of the loss in bf16: its weights' rounding alone moves a loss by 2^-9 of itself (tests/ops/cuda/test_training.py)."""
LONG_STEPS, LONG_RELATIVE = 60, 1e-3
"""Between two CPU backends the difference is 1e-8 after 20 steps and grows tenfold every 20 to 30 steps from the 40th
on; after 100 this run is chaotic. A device whose first differences are 1e-6 stays a factor 10 below the bound."""


def _losses(backend: Backend, steps: int, **changes: Any) -> list[float]:
    run = Run(backend, tiny_architecture(**changes))
    return [run.step() for _ in range(steps)]


def _largest_difference(got: list[float], want: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(got, want, strict=True))


@pytest.fixture(scope="module")
def numpy_losses() -> list[float]:
    return _losses(get_backend("numpy", workers=1), STEPS)


def test_training_follows_numpy(
    every_backend: Backend, numpy_losses: list[float], within: Callable[[str, float, float], None]
) -> None:
    """All 20 steps on a GPU; five on the simulator, where tests/ops/cuda has a run of 20."""
    steps = 5 if every_backend.name == "simulator" else STEPS
    got = _losses(every_backend, steps)
    assert numpy_losses[-1] < numpy_losses[0] - 0.5, "the run learns nothing, so it proves nothing"
    within(f"losses on {every_backend.name}", _largest_difference(got, numpy_losses[:steps]), RELATIVE)


@pytest.mark.gpu
def test_long_training_follows_numpy(within: Callable[[str, float, float], None]) -> None:
    got, want = (_losses(get_backend(name, workers=1), LONG_STEPS) for name in ("cupy", "numpy"))
    within(f"losses over {LONG_STEPS} steps", _largest_difference(got, want), LONG_RELATIVE)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", ["simulator", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_training_in_bf16_follows_float32_on_numpy(
    numpy_losses: list[float], within: Callable[[str, float, float], None], name: str, masters: bool
) -> None:
    steps = 5 if name == "simulator" else STEPS
    backend = get_backend(name, precision="bf16") if name == "cupy" else _simulator()
    run = Run(backend, tiny_architecture(), masters)
    got = [run.step() for _ in range(steps)]
    within(f"losses on {name}", _largest_difference(got, numpy_losses[:steps]), BF16_RELATIVE)
    assert run.parameters.flat.dtype == BFLOAT16


def _simulator() -> Backend:
    simulator_or_skip()
    return get_backend("simulator", precision="bf16")


@pytest.mark.gpu
def test_training_in_tf32_follows_float32(within: Callable[[str, float, float], None]) -> None:
    """The same bits would say that the products are not of TF32."""
    runs = [Run(get_backend("cupy", precision=precision), tiny_architecture()) for precision in ("tf32", "fp32")]
    got, want = ([run.step() for _ in range(STEPS)] for run in runs)
    within("losses", _largest_difference(got, want), BF16_RELATIVE / 8)  # 10 bits of mantissa instead of 7
    assert got != want


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "masters"), [*((name, True) for name in PRECISIONS), ("bf16", False)])
@pytest.mark.parametrize("changes", [{}, {"positions": "rope", "kv_heads": 1, "bias": False}], ids=["plain", "rope"])
def test_two_runs_have_the_same_bits(changes: dict[str, Any], precision: Any, masters: bool) -> None:
    backend = get_backend("cupy", precision=precision)
    first, second = (Run(backend, tiny_architecture(**changes), masters) for _ in range(2))
    assert [first.step() for _ in range(30)] == [second.step() for _ in range(30)]
    for one, other in zip(first.flats, second.flats, strict=True):
        assert np.array_equal(backend.to_host(one).view(np.uint16), backend.to_host(other).view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_memory_does_not_grow(precision: Any) -> None:
    """After a few steps CuPy's pool takes nothing more from the card, and no more of it is in use after a step."""
    backend = get_backend("cupy", precision=precision)
    run = Run(backend, tiny_architecture())
    pool = backend.xp.get_default_memory_pool()
    for _ in range(5):
        run.step()
    held, used = pool.total_bytes(), pool.used_bytes()
    for _ in range(200):
        run.step()
    assert pool.total_bytes() == held
    assert pool.used_bytes() == used


@pytest.mark.gpu
def test_the_trainer_on_the_gpu_follows_numpy(tmp_path: Any, within: Callable[[str, float, float], None]) -> None:
    """The whole loop, with evaluation and dropout: needs every dependency of the package."""
    for module in ("safetensors", "threadpoolctl"):
        pytest.importorskip(module, reason=f"not run, {module} is not installed")
    losses = [_trainer_losses(name, tmp_path) for name in ("cupy", "numpy")]
    within("the trainer's losses", _largest_difference(*losses), RELATIVE)


def _trainer_losses(backend: str, folder: Any) -> list[float]:
    training, data = importlib.import_module("cllm_gpu.training.trainer"), importlib.import_module("cllm_gpu.data")
    config = importlib.import_module("cllm_gpu.config")
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x * {i}\n" for i in range(400)), encoding="utf-8")
    dataset = data.open_dataset(
        str(text), tokenizer="bytes", validation_fraction=0.1, seed=1, cache_folder=folder / "cache", context=24
    )
    settings = config.Config(
        model=config.ModelConfig(layers=2, heads=2, width=32, context=24, dropout=0.1),
        training=config.TrainingConfig(steps=STEPS, batch=6, micro_batch=3, evaluate_every=10, evaluation_batches=2),
    )
    records: list[dict[str, Any]] = []
    reporter = training.Silent()
    reporter.step = records.append
    trainer = training.Trainer(settings, get_backend(backend, workers=1), dataset, reporter=reporter)
    trainer.initialise()
    trainer.train()
    trainer.close()
    return [record["loss"] for record in records]
