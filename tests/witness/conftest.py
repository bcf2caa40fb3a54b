"""PyTorch and transformers, where they are installed: an independent witness.

Without them these tests are skipped with the reason; with CLLM_REQUIRE_WITNESS=1 they fail instead.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import pytest


def _witness(name: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a third party's import warns of is not ours to mend
            return importlib.import_module(name)
    except ImportError as error:
        reason = f"{name} cannot be imported ({error}); pip install 'cllm-gpu[witness]'"
        if os.environ.get("CLLM_REQUIRE_WITNESS") == "1":
            pytest.fail(f"CLLM_REQUIRE_WITNESS=1 but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch on one thread: these models are too small for two."""
    module = _witness("torch")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def transformers(torch: ModuleType) -> ModuleType:
    return _witness("transformers")
