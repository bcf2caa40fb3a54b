"""Compiles every variant of every kernel for this machine's GPU, in parallel, into CuPy's cache on disk.

    python -m bench.gpu_check.precompile

Later parts of the check read the compiled kernels from there; compiling them one by one would take most of its time.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

from cllm_gpu.ops.cuda.kernel_source import load_source
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.cuda.variants import all_variants

TEST_HEAD_SIZES = (8, 16, 17, 18, 19)
"""Head sizes in tests that are not among those of `all_variants`."""
MOST_PROCESSES = 12


def variants_of_the_check() -> list[Variant]:
    """All variants, and attention at the additional head sizes of the tests; the slowest to compile first."""
    variants = all_variants()
    plain = [v for v in variants if ("HEAD_SIZE", 32) in v.defines]
    for size in TEST_HEAD_SIZES:
        variants += [dataclasses.replace(v, defines=(("HEAD_SIZE", size),)) for v in plain]
    return sorted(variants, key=lambda v: (v.source.startswith("attention"), v.storage == "bfloat16"), reverse=True)


def compile_variant(variant: Variant, module_class: Any = None) -> float:
    """Compile a variant as the launcher does. Returns the seconds it took."""
    if module_class is None:
        module_class = importlib.import_module("cupy").RawModule
    begun = time.monotonic()
    module_class(code=load_source(variant.source), options=variant.options).compile()
    return time.monotonic() - begun


def compile_all(pool: Executor, variants: list[Variant], *module_class: Any) -> list[tuple[float, Variant]]:
    """(seconds, variant) of each. Raises the errors of the compiler."""
    futures = [(pool.submit(compile_variant, variant, *module_class), variant) for variant in variants]
    return [(future.result(), variant) for future, variant in futures]


def main() -> int:
    """Compile everything. Returns exit status 0."""
    processes = min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) - 1))
    begun = time.monotonic()
    # CUDA does not support fork
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        taken = compile_all(pool, variants_of_the_check())
    slowest, variant = max(taken, key=lambda pair: pair[0])
    name = f"{variant.source} {variant.storage} {dict(variant.defines)}"
    elapsed = time.monotonic() - begun
    print(f"{len(taken)} variants in {elapsed:.0f} s by {processes} processes; slowest {slowest:.1f} s: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
