"""Launches every kernel of every source once at small and odd sizes, to be run under the sanitizers.

    python -m bench.gpu_check.launch_all [--device cupy | simulator] [--quick]

On a GPU, each array is a separate allocation, so that a sanitizer detects an access one element past its end. On the
simulator, every memory access is checked by the simulator itself. Exit status 1 if a kernel was not launched or a
result is not finite.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.kernels.cases import DTYPES, ODD, SMALL, BoundCase
from bench.kernels.operation_cases import NAMES, cuda_side, make_case
from cllm_gpu.model.lattice import lattice_points, symmetry_turns
from cllm_gpu.ops.cuda.adam import adam_step_on_device
from cllm_gpu.ops.cuda.attention import METHODS, attention_backward, attention_forward
from cllm_gpu.ops.cuda.column_sum import column_sum
from cllm_gpu.ops.cuda.kernel_source import kernel_parameters, source_directory
from cllm_gpu.ops.cuda.launcher import Launcher
from cllm_gpu.ops.cuda.rotary import rotary_backward, rotary_forward
from cllm_gpu.ops.cuda.sgd import sgd_step
from cllm_gpu.ops.cuda.squared_norm import squared_norm_on_device
from cllm_gpu.ops.cuda.step_decision import NUMBERS, add_losses, decide_step
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.cuda.variants import all_variants
from cllm_gpu.ops.reference.rotary import rotary_tables
from cllm_gpu.ops.reference.rounding import StochasticRounding
from cllm_gpu.ops.reference.score_bias import ScoreBias, ScoreBiasGradients
from cllm_gpu.ops.reference.symmetry import Symmetry
from cllm_gpu.utils.errors import UserError

QUICK_HEAD_SIZES = (32, 64)
Put = Callable[[np.ndarray[Any, Any]], Any]


class CountingLauncher(Launcher):
    """A launcher that counts the launches of each kernel, by source and name."""

    def __init__(self, xp: Any, module_class: Any) -> None:
        super().__init__(xp, module_class)
        self.launches: Counter[tuple[str, str]] = Counter()

    def launch(self, variant: Variant, name: str, *arguments: Any, **options: Any) -> None:
        self.launches[variant.source, name] += 1
        super().launch(variant, name, *arguments, **options)


def all_kernels() -> set[tuple[str, str]]:
    """(source, kernel) of every entry point."""
    sources = sorted(path.name for path in source_directory().glob("*.cu"))
    return {(source, kernel) for source in sources for kernel in kernel_parameters(source)}


def exercise(launcher: Launcher, put: Put, *, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (description of the call, results) for every operation and kernel variant. quick: fewer head sizes."""
    for storage in DTYPES:
        for sizes in (SMALL, ODD):
            for name in NAMES:
                case = make_case(name, storage, sizes)
                bound = BoundCase(case, cuda_side(case, launcher), put)
                bound.call()
                yield f"{name} {storage}", bound.results()
        yield from _optimizer(launcher, put, storage)
    for variant in all_variants():
        if variant.source == "attention.cu" and (dict(variant.defines)["HEAD_SIZE"] in QUICK_HEAD_SIZES or not quick):
            yield from _attention(launcher, put, variant)
        if variant.source == "rotary.cu" and "SYMMETRY_PAIRS" in dict(variant.defines):
            yield from _rotary(launcher, put, variant)


def _decide(
    launcher: Launcher, put: Put, storage: str, gradients: Any, clip: Any, skip: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gradient norm, clipping factor and skip flag on the device, with more losses than a block has threads."""
    losses, sums = put(np.ones(700, np.float32)), put(np.zeros(2))
    add_losses(launcher, losses, sums, accumulate=False, storage=storage)
    squared_norm_on_device(launcher, gradients, total=sums[1:])
    rate, counts = put(np.full(1, 1e-3)), put(np.array([4, 0], np.int32))
    numbers, draw, outcome = (put(x) for x in (np.zeros((2, NUMBERS), np.float32), np.zeros(1, np.uint32), np.zeros(1)))
    norms = (put(np.zeros(2)), put(np.ones(2)))
    decide_step(
        launcher, sums, rate, counts, numbers, clip, skip, draw, outcome, *norms,
        beta1=0.9, beta2=0.95, decay=0.1, other_rate=30.0, clip_norm=1.0, largest=1e19, limit=1e38,
        carry=0.9, gain=0.1, amplification=1e8, coupled_decay=0.0, maximum_skipped=5, storage=storage,
    )  # fmt: skip
    yield f"decide_step {storage}", {"sums": sums, "counts": counts, "numbers": numbers, "clip": clip}


def _optimizer(launcher: Launcher, put: Put, storage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The decisions of a step; optimizer steps with a copy and without master weights; a float32 column sum."""
    rng = np.random.default_rng(3)
    size = 4099
    gradients = put(rng.standard_normal(size, np.float32).astype(DTYPES[storage]))
    state = [put(rng.random(size, np.float32)) for _ in range(3)]
    clip, skip = put(np.zeros(1, np.float32)), put(np.zeros(1, np.int32))
    copy = put(np.zeros(size, DTYPES[storage]))
    yield from _decide(launcher, put, storage, gradients, clip, skip)
    adam_step_on_device(
        launcher, state[0], gradients, *state[1:], rate=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, step=2,
        weight_decay=0.1, decayed=1000, decoupled=True, gradient_scale=1.0, copy=copy, clip=clip, skip=skip,
        zero_gradients=True,
    )  # fmt: skip
    yield f"mixed adam_step {storage}", {"parameters": state[0], "copy": copy, "clip": clip}
    if storage == "bfloat16":  # without master weights
        options: dict[str, Any] = {"rate": 1e-3, "weight_decay": 0.1, "decayed": 1000, "gradient_scale": 1.0}
        options["rounding"] = StochasticRounding(seed=5, step=2)
        sgd_step(launcher, copy, gradients, state[1], momentum=0.9, **options)
        options |= {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "step": 2, "decoupled": True}
        adam_step_on_device(launcher, copy, gradients, *state[1:], **options)
        yield "steps without masters", {"parameters": copy, "first_moment": state[1]}
    sums = put(np.zeros(33, np.float32))
    column_sum(launcher, put(rng.standard_normal((70, 33), np.float32).astype(DTYPES[storage])), sums, accumulate=False)
    yield f"column_sum {storage}", {"sums": sums}


def _attention(launcher: Launcher, put: Put, variant: Variant) -> Iterator[tuple[str, dict[str, Any]]]:
    """More than one tile of queries and keys, packed operands, the variant's score terms; every backward method."""
    chosen, dtype = dict(variant.defines), DTYPES[variant.storage]
    gradient = DTYPES[variant.gradient or variant.storage]
    size = chosen["HEAD_SIZE"]
    rng = np.random.default_rng(size)
    length, heads = 130, 2
    tokens = np.resize(rng.integers(0, 9, 17), (1, length)).astype(np.int32)
    seen = put(tokens)
    score_bias = _score_bias(put, rng, chosen, (tokens, seen, heads), dtype)
    whole, given = (rng.standard_normal((1, length, n * heads, size), np.float32) for n in (3, 1))
    packed, dout = put(whole.astype(dtype)), put(given.astype(dtype))
    out = put(np.full_like(given, np.nan, dtype))
    q, k, v = (packed[:, :, i * heads : (i + 1) * heads] for i in range(3))
    lse = put(np.full((1, heads, length), np.nan, np.float32))
    options: dict[str, Any] = {"causal": True, "scale": size**-0.5, "score_bias": score_bias}
    options["symmetry"] = _symmetry(put, seen, chosen.get("SYMMETRY_PAIRS", 0))
    attention_forward(launcher, q, k, v, out, lse, **options)
    learned = "TERM_POINT_GRADIENTS" in chosen
    for method in METHODS[:1] if learned else METHODS:  # only the first computes gradients of points
        gradients = put(np.full_like(whole, np.nan, dtype))
        dq, dk, dv = (gradients[:, :, i * heads : (i + 1) * heads] for i in range(3))
        if score_bias is not None:
            points = put(np.zeros((1, length, 3), np.float32)) if learned else None
            options["dscore_bias"] = ScoreBiasGradients(put(np.zeros(score_bias.scalars.shape, gradient)), points)
        attention_backward(launcher, dout, q, k, v, out, lse, dq, dk, dv, method=method, **options)
        results = {"out": out, "lse": lse, "gradients": gradients}
        if score_bias is not None:
            results |= {"dscalars": options["dscore_bias"].scalars}
        yield f"attention {variant.options}, {method}", results


def _rotary(launcher: Launcher, put: Put, variant: Variant) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rotary embedding with the variant's symmetry, forward and backward, on heads that fill 1 + a fraction blocks."""
    pairs, (length, half) = dict(variant.defines)["SYMMETRY_PAIRS"], (17, 12)
    x = put(
        np.random.default_rng(4).standard_normal((2, length, 3, 2 * half), np.float32).astype(DTYPES[variant.storage])
    )
    symmetry = _symmetry(put, put(np.arange(2 * (length + 1), dtype=np.int32).reshape(2, -1)), pairs)
    tables = [put(table) for table in rotary_tables(np, length, 2 * half, np.float32)]
    rotary_forward(launcher, x, *tables, symmetry=symmetry)
    rotary_backward(launcher, x, *tables, symmetry=symmetry)
    yield f"rotary {variant.options}", {"x": x}


def _symmetry(put: Put, tokens: Any, pairs: int) -> Symmetry | None:
    return Symmetry(tokens, put(symmetry_turns(pairs).astype(np.float32))) if pairs else None


def _score_bias(
    put: Put, rng: np.random.Generator, chosen: dict[str, int], given: tuple[Any, Any, int], dtype: Any
) -> ScoreBias | None:
    """The variant's score terms; None if it has none. given: tokens (B, S), the same on the device, number of heads."""
    tokens, seen, heads = given
    names = ("TERM_DISTANCE", "TERM_PRIME_DISTANCE", "TERM_SAME_TOKEN", "TERM_MATCHES")
    distance, prime_distance, same_token, matches = (chosen.get(name, 0) for name in names)
    count = distance + prime_distance + same_token + matches
    if not count:
        return None
    points = put(lattice_points(9)[tokens].astype(np.float32)) if distance or prime_distance else None
    scalars = put(rng.random((heads, count), np.float32).astype(dtype))
    return ScoreBias(seen, points, scalars, bool(distance), bool(prime_distance), bool(same_token), matches)


def _launcher(device: str) -> tuple[CountingLauncher, Put, Callable[[Any], Any]]:
    if device == "simulator":
        from cllm_gpu.simulator import RawModule
        from cllm_gpu.utils.compiler import require_compiler

        require_compiler()
        os.environ["CLLM_SIMULATOR_CHECK"] = "1"
        return CountingLauncher(np, RawModule), lambda x: np.array(x, copy=True), np.asarray
    cupy = importlib.import_module("cupy")
    cupy.cuda.set_allocator(None)  # no memory pool: a separate allocation for each array
    return CountingLauncher(cupy, cupy.RawModule), cupy.asarray, cupy.asnumpy


def _is_number(x: Any) -> bool:
    return bool(np.isfinite(np.asarray(x).astype(np.float64)).all())


def run(device: str, *, quick: bool) -> int:
    """Launch everything on `device`. Returns the exit status."""
    launcher, put, get = _launcher(device)
    bad = [
        f"{what}: {name}"
        for what, results in exercise(launcher, put, quick=quick)
        for name, x in results.items()
        if not _is_number(x if isinstance(x, float) else get(x))
    ]
    left_out = sorted(all_kernels() - set(launcher.launches))
    for line in bad:
        print(f"not a number: {line}")
    for source, kernel in left_out:
        print(f"never launched: {kernel} in {source}")
    print(f"{len(launcher.launches)} kernels, {launcher.launches.total()} launches on {device}")
    return 1 if bad or left_out else 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Launch every kernel once, for a sanitizer to watch.")
    parser.add_argument("--device", choices=("cupy", "simulator"), default="cupy")
    parser.add_argument("--quick", action="store_true", help="two head sizes instead of all")
    options = parser.parse_args(arguments)
    try:
        return run(options.device, quick=options.quick)
    except UserError as error:
        print(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
