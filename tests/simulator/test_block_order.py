"""Ways in which blocks hand results on that CUDA allows: the checker lets them pass, but not without a part."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_gpu.simulator import KernelError, RawModule, Schedule

BLOCKS, THREADS = 3, 64
BODIES = {
    # every thread fences its own write, one counts the blocks; the last one adds up
    "last_block": """
    y[i] = x[i];
    __threadfence();
    __syncthreads();
    __shared__ bool last;
    if (t == 0) last = atomicAdd(&counters[0], 1u) == gridDim.x - 1;
    __syncthreads();
    if (last)
        for (int b = 0; b < gridDim.x; b++) y[t + gridDim.x * 64] += y[b * 64 + t];""",
    # a lock around a sum
    "lock": """
    if (t == 0) {
        while (atomicCAS(&counters[0], 0u, 1u) != 0) {}
        __threadfence();
        y[0] += x[i];
        __threadfence();
        atomicExch(&counters[0], 0u);
    }""",
    # the lanes of a warp write, one of them fences for all
    "warp": """
    const int lane = t % 32, warp = t / 32;
    if (lane == 0) wait_for_turn(counters + warp, blockIdx.x);
    __syncwarp();
    y[t] = (blockIdx.x ? y[t] : 0.0f) + x[i];
    __syncwarp();
    if (lane == 0) pass_turn(counters + warp, blockIdx.x + 1);""",
    # the first block's results reach the third one through the second, which does not touch them
    "chain": """
    if (t == 0 && blockIdx.x > 0) wait_for_turn(counters + blockIdx.x, 1);
    __syncthreads();
    if (blockIdx.x == 0) y[t] = x[i];
    if (blockIdx.x == 2) y[t] += x[i];
    __syncthreads();
    if (t == 0) pass_turn(counters + blockIdx.x + 1, 1);""",
}
NEEDED = {
    "last_block": ("__threadfence();", "__syncthreads();"),
    "lock": ("        __threadfence();\n        atomicExch",),
    "warp": ("if (lane == 0) wait_for_turn(counters + warp, blockIdx.x);", "__syncwarp();"),
    "chain": ("if (t == 0 && blockIdx.x > 0) wait_for_turn(counters + blockIdx.x, 1);",),
}
"""What each of them cannot do without; of several the first is taken away."""


def _kernel(name: str, body: str) -> str:
    return (
        f'extern "C" __global__ void {name}(const float* x, float* y, unsigned* counters) {{\n'
        f"    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;\n{body}\n}}\n"
    )


@pytest.fixture(scope="module")
def module() -> RawModule:
    from cllm_gpu.ops.cuda.kernel_source import source_directory

    kernels = [_kernel(name, body) for name, body in BODIES.items()]
    for name, parts in NEEDED.items():
        for number, part in enumerate(parts):
            assert part in BODIES[name], part
            kept = "        atomicExch" if part.endswith("atomicExch") else ""
            kernels.append(_kernel(f"{name}_without_{number}", BODIES[name].replace(part, kept, 1)))
    code = "\n".join(['#include "common.cuh"', *kernels])
    return RawModule(code=code, options=(f"-I{source_directory()}",), check=True)


def _run(module: RawModule, name: str, seed: int) -> np.ndarray:
    x = np.linspace(1, 2, BLOCKS * THREADS, dtype=np.float32)
    y, counters = np.zeros((BLOCKS + 1) * THREADS, np.float32), np.zeros(BLOCKS + 2, np.uint32)
    module.get_function(name)((BLOCKS,), (THREADS,), (x, y, counters), schedule=Schedule(seed))
    return y


@pytest.mark.parametrize("name", BODIES)
def test_what_cuda_allows_passes(module: RawModule, name: str) -> None:
    first = _run(module, name, 0)
    assert first.any()
    for seed in range(1, 6):
        assert _run(module, name, seed).tobytes() == first.tobytes()


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, parts in NEEDED.items() for i in range(len(parts))])
def test_without_a_part_it_is_a_race(module: RawModule, name: str, number: int) -> None:
    for seed in range(4):
        with pytest.raises(KernelError) as caught:
            _run(module, f"{name}_without_{number}", seed)
        assert caught.value.kind == "race", str(caught.value)
