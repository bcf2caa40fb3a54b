"""Which backend is taken, what is said when one is not available, and that the code above mixes no arrays."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cllm_gpu import backend as backends
from cllm_gpu.backend import Backend, get_backend
from cllm_gpu.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from cllm_gpu.data import open_dataset
from cllm_gpu.devices import driver as gpu
from cllm_gpu.devices.logit_chunks import ON_CARD
from cllm_gpu.ops.cuda.column_major import COMPUTE_32F_FAST_TF32
from cllm_gpu.ops.cuda.gemm import _compute_type
from cllm_gpu.ops.precision import BFLOAT16
from cllm_gpu.ops.registry import reference_operations
from cllm_gpu.training.diagnostics import DIAGNOSTICS
from cllm_gpu.training.metrics import read_metrics
from cllm_gpu.training.trainer import Trainer
from cllm_gpu.utils.compiler import find_compiler
from cllm_gpu.utils.errors import UserError
from tests.strict_device import DeviceArray, StrictModule


def test_names_come_from_argument_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLLM_BACKEND", "numpy")
    assert get_backend().name == "numpy"
    monkeypatch.setenv("CLLM_BACKEND", "abacus")
    with pytest.raises(UserError, match="'abacus' is not known; choose one of auto, numpy"):
        get_backend()
    assert get_backend("numpy").name == "numpy"


def test_auto_says_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLLM_BACKEND", raising=False)
    monkeypatch.setattr(gpu, "find_driver", lambda: None)
    taken = get_backend("auto")
    assert taken.name == ("native" if find_compiler() else "numpy")
    assert taken.description.startswith(f"{taken.name}: ")
    assert "\n" not in taken.description


@pytest.mark.parametrize(
    ("driver", "has_cupy", "expected"),
    [
        (None, True, "no NVIDIA driver found"),
        (gpu.Driver((12, 4), 0), True, "sees no device"),
        (gpu.Driver((11, 8), 1), True, "runs CUDA 11.8; CUDA 12 or newer is needed"),
        (gpu.Driver((12, 4), 1), False, "pip install 'cllm-gpu[cuda12]'"),
        (gpu.Driver((13, 0), 2), False, "pip install 'cllm-gpu[cuda13]'"),
        (gpu.Driver((14, 1), 1), False, "pip install 'cllm-gpu[cuda13]'"),
    ],
)
def test_what_is_missing_for_cupy(
    monkeypatch: pytest.MonkeyPatch, driver: gpu.Driver | None, has_cupy: bool, expected: str
) -> None:
    monkeypatch.setattr(gpu, "find_driver", lambda: driver)
    monkeypatch.setattr(gpu, "has_cupy", lambda: has_cupy)
    with pytest.raises(UserError, match=r"^backend cupy is not available: ") as caught:
        get_backend("cupy")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert get_backend("auto").name != "cupy"


def test_a_broken_cupy_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(gpu, "find_driver", lambda: gpu.Driver((12, 4), 1))
    monkeypatch.setattr(gpu, "has_cupy", lambda: True)
    with pytest.raises(UserError, match=r"libcublas\.so\.12: cannot open shared object file"):
        get_backend("cupy")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in for the driver is built for Linux")
@pytest.mark.parametrize(
    ("version", "devices", "extra"), [(12080, 1, "cuda12"), (13010, 2, "cuda13"), (12080, 0, ""), (11080, 1, "")]
)
def test_the_driver_is_asked_itself(tmp_path: Path, version: int, devices: int, extra: str) -> None:
    """`make train` installs what `python -m cllm_gpu.devices.driver` prints; here a library stands for the driver's."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler to build the stand-in for the driver")
    source = tmp_path / "driver.cpp"
    source.write_text(
        f'extern "C" int cuDriverGetVersion(int* v) {{ *v = {version}; return 0; }}\n'
        'extern "C" int cuInit(unsigned) { return 0; }\n'
        f'extern "C" int cuDeviceGetCount(int* n) {{ *n = {devices}; return 0; }}\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "cllm_gpu.devices.driver"],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == extra


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("native", "bf16", "backend native does not train in bf16: choose cupy or numpy or simulator, or fp32"),
        ("native", "tf32", "backend native does not train in tf32: choose cupy, or fp32"),
        ("numpy", "tf32", "backend numpy does not train in tf32: choose cupy, or fp32"),
        ("simulator", "tf32", "backend simulator does not train in tf32: choose cupy, or fp32"),
        ("auto", "bf16", "precision bf16 is for a GPU, and there is none to use (no NVIDIA driver found"),
        ("auto", "tf32", "precision tf32 is for a GPU, and there is none to use (no NVIDIA driver found"),
        ("numpy", "fp8", "precision 'fp8' is not known; choose one of fp32, tf32, bf16"),
    ],
)
def test_a_precision_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: Any, message: str
) -> None:
    monkeypatch.setattr(gpu, "find_driver", lambda: None)
    with pytest.raises(UserError) as caught:
        get_backend(name, precision=precision)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class _Card(ModuleType):
    """As much of CuPy as a backend asks for before anything is computed: an NVIDIA card of one generation."""

    def __init__(self, generation: int) -> None:
        super().__init__("cupy")
        pool = SimpleNamespace(total_bytes=0, free_bytes=lambda: 300)
        self.RawModule = self.get_default_memory_pool = lambda *_: pool
        runtime = SimpleNamespace(
            getDeviceProperties=lambda _: {"name": b"A card", "major": generation}, memGetInfo=lambda: (5000, 9000)
        )
        self.cuda = SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=0))


@pytest.mark.parametrize("generation", [7, 8])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_what_a_cards_generation_computes_in(monkeypatch: pytest.MonkeyPatch, generation: int, precision: Any) -> None:
    """TF32 is a property of the launcher that the products read, whatever the environment says."""
    monkeypatch.setattr(gpu, "find_driver", lambda: gpu.Driver((12, 4), 1))
    monkeypatch.setattr(gpu, "has_cupy", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", _Card(generation))
    monkeypatch.setenv("CUPY_TF32", "1")
    if generation < 8 and precision != "fp32":
        with pytest.raises(UserError, match=f"^A card has no tensor cores for {precision}"):
            get_backend("cupy", precision=precision)
        return
    backend = get_backend("cupy", precision=precision)
    launcher = backend.ops.linear_forward.__wrapped__.args[0]  # type: ignore[attr-defined]
    assert launcher.tf32 is (precision == "tf32")
    assert (_compute_type(launcher, np.zeros(1, np.float32)) == COMPUTE_32F_FAST_TF32) is (precision == "tf32")
    assert backend.logit_chunks == ON_CARD
    assert backend.precisions == (("fp32",) if generation < 8 else ("fp32", "tf32", "bf16"))
    assert (backend.precision, backend.dtype) == (precision, BFLOAT16 if precision == "bf16" else np.float32)
    assert (backend.is_card, backend.memory_free()) == (True, 5300)  # the pool holds what it may give again


def test_allocations_are_aligned() -> None:
    backend = get_backend("numpy")
    for size in (1, 100, 4096):
        assert backend.empty_bytes(size).ctypes.data % 128 == 0
    zeros = backend.zeros(33, np.float32)
    assert zeros.shape == (33,)
    assert not zeros.any()


@pytest.fixture
def strict() -> Backend:
    """The reference operations on arrays that cannot be mixed with NumPy's."""
    module = StrictModule()
    return Backend("cupy", module, reference_operations(module), "strict device")


def test_the_strict_device_is_strict(strict: Backend) -> None:
    x = strict.asarray(np.arange(4.0))
    assert isinstance(x + x, DeviceArray)
    for mix in (lambda: x + np.ones(4), lambda: np.add(x, x), lambda: np.concatenate([x, x]), lambda: np.asarray(x)):
        with pytest.raises(TypeError):
            mix()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_training_mixes_no_arrays(strict: Backend, tmp_path: Path, optimizer: str, positions: str) -> None:
    """A whole run, checkpoint, evaluation and looks included, on a device that is not NumPy follows NumPy's losses."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten. " * 60)
    dataset = open_dataset(
        str(text), tokenizer="bytes", validation_fraction=0.1, seed=1, cache_folder=tmp_path / "cache", context=16
    )
    config = Config(
        model=ModelConfig(layers=2, heads=2, kv_heads=1, width=16, context=16, dropout=0.1),
        optimizer=OptimizerConfig(weight_decay=0.1),
        schedule=ScheduleConfig(warmup_steps=2),
        training=TrainingConfig(
            steps=4, batch=4, micro_batch=2, evaluate_every=2, evaluation_batches=1, diagnose_every=4
        ),
    )
    config = dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, name=optimizer),
        model=dataclasses.replace(config.model, positions=positions),
    )
    losses, looks = [], []
    for number, backend in enumerate((get_backend("numpy", workers=1), strict)):
        trainer = Trainer(config, backend, dataset, folder=tmp_path / str(number))
        trainer.initialise()
        outcome = trainer.train()
        assert outcome.evaluation is not None
        losses.append(outcome.evaluation.loss)
        looks.append([look["activations"] for look in read_metrics(tmp_path / str(number) / DIAGNOSTICS)])
        trainer.restore(trainer.state.snapshot())
        trainer.close()
    assert abs(losses[0] - losses[1]) <= 1e-5 * losses[0], losses  # float32 sums in another order
    assert [len(found) for found in looks] == [2, 2]
    for own, other in zip(*looks, strict=True):
        assert {kind: pytest.approx(values, rel=1e-3) for kind, values in own.items()} == other  # single elements


def test_cores_are_counted() -> None:
    assert 1 <= backends.usable_cores() <= (os.cpu_count() or 1)
