"""Small kernels, each with one planted defect between the marks `//-` and `//+`.

A source is written once: a line that ends in `//+` stands only in the sound kernel, one that ends in `//-` only in the
defective one, so that the two differ in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Defect:
    """One defect, and what the checker must call it."""

    name: str
    kind: str
    """KernelError.kind, or several of them joined by "|" where the order of the threads decides."""
    source: str
    words: str = ""
    """Must stand in the message."""
    line_of: str = ""
    """Text of the line that the report must name; empty where several lines are right."""
    block: int = 64
    grid: int = 1
    n: int = 64
    shared_mem: int = 0
    lazy_copies: bool = True
    options: tuple[str, ...] = field(default_factory=tuple)

    def sound(self) -> str:
        """The kernel without the defect."""
        return self._without("//-")

    def defective(self) -> str:
        """The kernel with it."""
        return self._without("//+")

    def _without(self, mark: str) -> str:
        return "\n".join("" if line.rstrip().endswith(mark) else line for line in self.source.split("\n"))


def _kernel(body: str) -> str:
    """A kernel of one input and one output array of n floats; i is the thread's global index, t the thread."""
    return (
        '#include "common.cuh"\n'
        'extern "C" __global__ void kernel(const float* x, float* y, int n) {\n'
        "    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;\n"
        f"{body}\n}}\n"
    )


def _in_turn(**changes: str) -> str:
    """Blocks add to one row in the order of their index; `changes` replace lines, by their marks."""
    lines = {
        "wait": "    if (t == 0) wait_for_turn(turn, blockIdx.x);",
        "after": "    __syncthreads();",
        "sum": "    __stcg(y + t, (blockIdx.x ? __ldcg(y + t) : 0.0f) + x[i]);  // sum",
        "before": "    __syncthreads();",
        "fence": "    if (t == 0) __threadfence();",
        "pass": "    if (t == 0) atomicExch(turn, blockIdx.x + 1);",
    }
    sound = [f"{line} //+" if mark in changes else line for mark, line in lines.items()]
    defective = [f"    {line}  //-" for line in changes.values()]
    at = list(lines).index(next(iter(changes))) + 1
    counter = "    unsigned* turn = reinterpret_cast<unsigned*>(y + n - 2);"
    return _kernel("\n".join([counter, *sound[:at], *defective, *sound[at:]]))


DEFECTS = (
    Defect(
        "missing barrier between writing and reading shared memory",
        "race|uninitialised",
        _kernel("""
    __shared__ float s[64];
    s[t] = x[i];
    __syncthreads();  //+
    y[i] = s[63 - t];  // read"""),
    ),
    Defect(
        "missing barrier before shared memory is written again",
        "race",
        _kernel("""
    __shared__ float s[64];
    float sum = 0.0f;
    for (int k = 0; k < 2; ++k) {
        s[t] = x[i] + k;
        __syncthreads();
        sum += s[63 - t];
        __syncthreads();  //+
    }
    y[i] = sum;"""),
        words="s, which thread",
    ),
    Defect(
        "a warp exchanges through shared memory without __syncwarp",
        "race|uninitialised",
        _kernel("""
    __shared__ float s[64];
    s[t] = x[i];
    __syncwarp();  //+
    y[i] = s[t ^ 1];  // read"""),
    ),
    Defect(
        "two threads write one global element",
        "race",
        _kernel("""
    y[i] = x[i];  //+
    y[i / 2] = x[i];  //-"""),
        line_of="y[i / 2]",
    ),
    Defect(
        "two blocks write one global element",
        "race",
        _kernel("""
    y[i] = x[i];  //+
    y[t] = x[i];  //-"""),
        grid=2,
        n=128,
        words="an earlier block",
        line_of="y[t] =",
    ),
    Defect(
        "a block reads what another writes in place",
        "race",
        _kernel("""
    y[i] = x[i];
    if (i >= 64) y[i] += 1.0f;  //+
    if (i >= 64) y[i] += y[i - 64];  //-"""),
        grid=2,
        n=128,
        line_of="y[i - 64]",
    ),
    Defect(
        "a sum without an atomic",
        "race",
        _kernel("""
    atomicAdd(&y[0], x[i]);  //+
    y[0] += x[i];  //-"""),
        line_of="y[0] += x[i];",
    ),
    Defect(
        "off by one in a global array",
        "out of range",
        _kernel("""
    if (i < n) y[i] = x[i];  //+
    if (i <= n) y[i] = x[i];  //-"""),
        n=40,
        words="160 bytes",
        line_of="if (i <= n)",
    ),
    Defect(
        "a read before the start of a global array",
        "out of range",
        _kernel("""
    y[i] = i > 0 ? x[i - 1] : 0.0f;  //+
    y[i] = x[i - 1];  //-"""),
        words="byte -4 of x",
        line_of="x[i - 1];  //-",
    ),
    Defect(
        "off by one in a static shared array, by index",
        "out of range",
        _kernel("""
    __shared__ float s[64];
    s[t] = x[i];
    __syncthreads();
    y[i] = s[t ^ 63];  //+
    y[i] = s[64 - t];  //-"""),
        line_of="s[64 - t]",
    ),
    Defect(
        "off by one in a static shared array, by pointer",
        "out of range",
        _kernel("""
    __shared__ float s[64];
    float* p = s;
    p[t] = x[i];  //+
    p[t + 1] = x[i];  //-
    __syncthreads();
    y[i] = p[t];"""),
        words="byte 256 of s",
        line_of="p[t + 1]",
    ),
    Defect(
        "a column past a row of a tile",
        "out of range",
        _kernel("""
    __shared__ float s[2][32];
    s[t / 32][t % 32] = x[i];  //+
    s[0][t] = x[i];  //-
    __syncthreads();
    y[i] = s[t / 32][t % 32];"""),
        line_of="s[0][t]",
    ),
    Defect(
        "off by one in dynamic shared memory",
        "out of range",
        _kernel("""
    extern __shared__ float s[];
    s[t] = x[i];  //+
    s[t + 1] = x[i];  //-
    __syncthreads();
    y[i] = s[t ^ 1];"""),
        shared_mem=256,
        words="dynamic shared memory",
        line_of="s[t + 1]",
    ),
    Defect(
        "a float4 load from a misaligned address",
        "misaligned",
        _kernel("""
    if (i < 8) store4(y + 4 * i, load4(x + 4 * i));  //+
    if (i < 8) store4(y + 4 * i, load4(x + 4 * i + 1));  //-"""),
    ),
    Defect(
        "a float4 load from shared memory that is aligned to 4 bytes only",
        "misaligned",
        _kernel("""
    __shared__ __align__(16) float s[64];  //+
    __shared__ float s[64];  //-
    s[t] = x[i];
    __syncthreads();
    if (t < 16) store4(y + 4 * t, *reinterpret_cast<float4*>(s + 4 * t));"""),
        line_of="reinterpret_cast<float4*>(s",
    ),
    Defect(
        "a read of shared memory that nothing has written",
        "uninitialised",
        _kernel("""
    __shared__ float s[64];
    s[t] = x[i];  //+
    if (t != 17) s[t] = x[i];  //-
    __syncthreads();
    y[i] = s[t];  // read"""),
        words="byte 68 of s",
        line_of="// read",
    ),
    Defect(
        "shared memory expected to last from one block to the next",
        "uninitialised",
        _kernel("""
    __shared__ float s[64];
    s[t] = 1.0f;  //+
    if (blockIdx.x == 0) s[t] = 1.0f;  //-
    __syncthreads();
    y[i] = x[i] + s[t];  // read"""),
        grid=2,
        n=128,
        line_of="// read",
    ),
    Defect(
        "a barrier in one branch only",
        "divergence",
        _kernel("""
    __shared__ float s[64];
    s[t] = x[i];
    __syncthreads();  //+
    if (t < 32) __syncthreads();  //-
    y[i] = s[t];"""),
        line_of="if (t < 32) __syncthreads();",
    ),
    Defect(
        "threads return before a barrier",
        "divergence",
        _kernel("""
    if (i >= n) return;  //-
    __shared__ float s[64];
    s[t] = i < n ? x[i] : 0.0f;
    __syncthreads();  // barrier
    if (i < n) y[i] = s[t];"""),
        n=40,
        line_of="// barrier",
    ),
    Defect(
        "two barriers for two halves of a block",
        "divergence",
        _kernel("""
    if (t < 32) y[i] = x[i];
    __syncthreads();  //+
    if (t < 32) __syncthreads();  //-
    else __syncthreads();  //-
    if (t >= 32) y[i] = x[i];"""),
    ),
    Defect(
        "a warp barrier whose mask names a lane that never comes",
        "divergence",
        _kernel("""
    if (t % 32 < 16) {
        __syncwarp(0x0000ffffu);  //+
        __syncwarp(0x0001ffffu);  //-
    } else {
        __syncwarp(0xffff0000u);
    }
    __syncthreads();
    y[i] = x[i];"""),
    ),
    Defect(
        "a shuffle whose mask does not name the caller",
        "warp mask",
        _kernel("""
    y[i] = __shfl_xor_sync(0xffffffffu, x[i], 1);  //+
    y[i] = __shfl_xor_sync(0x7fffffffu, x[i], 1);  //-"""),
        line_of="0x7fffffffu",
    ),
    Defect(
        "a shuffle from a lane that does not take part",
        "warp mask",
        _kernel("""
    float v = 0.0f;
    if (t % 32 < 16) {
        v = __shfl_down_sync(0x0000ffffu, x[i], 8, 16);  //+
        v = __shfl_down_sync(0x0000ffffu, x[i], 8);  //-
    }
    y[i] = v;"""),
        line_of="x[i], 8);",
    ),
    Defect(
        "an asynchronous copy that is not waited for",
        "asynchronous copy",
        _kernel("""
    __shared__ __align__(16) float s[64];
    if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, true);
    copy_async_commit();
    copy_async_wait<0>();  //+
    __syncthreads();
    y[i] = s[t];  // read"""),
        line_of="// read",
    ),
    Defect(
        "a wait that leaves the needed group pending",
        "asynchronous copy",
        _kernel("""
    __shared__ __align__(16) float s[64];
    if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, true);
    copy_async_commit();
    copy_async_wait<0>();  //+
    copy_async_wait<1>();  //-
    __syncthreads();
    y[i] = s[t];  // read"""),
        line_of="// read",
    ),
    Defect(
        "an asynchronous copy seen by other threads without a barrier",
        "race|uninitialised",
        _kernel("""
    __shared__ __align__(16) float s[64];
    if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, true);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();  //+
    y[i] = s[t];"""),
    ),
    Defect(
        "an asynchronous copy that overwrites a buffer still being read",
        "race",
        _kernel("""
    __shared__ __align__(16) float s[64];
    float sum = 0.0f;
    for (int k = 0; k < 2; ++k) {
        if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, true);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        sum += s[63 - t];
        __syncthreads();  //+
    }
    y[i] = sum;"""),
    ),
    Defect(
        "an asynchronous copy past the end of its source",
        "out of range",
        _kernel("""
    __shared__ __align__(16) float s[64];
    if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, 4 * t < n);  //+
    if (t < 16) copy_async_16(s + 4 * t, x + 4 * t, true);  //-
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (i < n) y[i] = s[t];"""),
        n=40,
        words="of x",
        line_of="x + 4 * t, true);",
    ),
    Defect(
        "a matrix row address that is not a multiple of 16",
        "misaligned",
        _kernel("""
    __shared__ __align__(16) bf16 s[64 * 8 + 8];
    for (int k = t; k < 64 * 8 + 8; k += 64) s[k] = to_bf16(1.0f);
    __syncthreads();
    u32 a[4];
    load_matrix_x4(a, s + 8 * t);  //+
    load_matrix_x4(a, s + 8 * t + 2);  //-
    y[i] = x[i] + a[0] + a[3];"""),
    ),
    Defect(
        "a matrix instruction without all lanes",
        "warp mask",
        _kernel("""
    const u32 a[4] = {0, 0, 0, 0};
    float d[4] = {0, 0, 0, 0};
    mma_bf16(d, a, 0, 0);  //+
    if (t != 5) mma_bf16(d, a, 0, 0);  //-
    y[i] = x[i] + d[0];"""),
    ),
    Defect(
        "an index product that passes 2^31",
        "arithmetic",
        _kernel("""
    const long long row = static_cast<long long>(n) * 40000000;  //+
    const long long row = n * 40000000;  //-
    y[i] = x[i] + (row > 0 ? 1.0f : 0.0f);"""),
        line_of="= n * 40000000",
    ),
    Defect(
        "a pointer to another thread's local array",
        "out of range",
        _kernel("""
    __shared__ float* p[64];
    float mine[2] = {x[i], x[i] + 1.0f};
    p[t] = mine;
    __syncthreads();
    y[i] = p[t][t & 1];  //+
    y[i] = p[t ^ 1][t & 1];  //-
    __syncthreads();"""),
        words="another thread's local memory",
        line_of="p[t ^ 1]",
    ),
    Defect(
        "results of other blocks read without a fence",
        "race",
        _kernel("""
    __shared__ bool last;
    unsigned* arrived = reinterpret_cast<unsigned*>(y + n - 1);
    if (t == 0) {
        y[1 + blockIdx.x] = x[i];
        __threadfence();  //+
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && t == 0) y[0] = y[1] + y[2];"""),
        grid=2,
        n=128,
    ),
    Defect("a turn that is not waited for", "race", _in_turn(wait=""), grid=3, n=192, line_of="// sum"),
    Defect(
        "a turn that is waited for at another address",
        "race",
        _in_turn(wait="if (t == 0) atomicAdd(turn + 1, 1u);"),
        grid=3,
        n=192,
        line_of="// sum",
    ),
    Defect(
        "a turn that one thread has, used by the others without a barrier", "race", _in_turn(after=""), grid=3, n=192
    ),
    Defect("a turn passed on before the others have written", "race", _in_turn(before=""), grid=3, n=192),
    Defect("a turn passed on without a fence", "race", _in_turn(fence=""), grid=3, n=192, line_of="// sum"),
    Defect(
        "a fence before the writes instead of behind them",
        "race",
        _in_turn(fence="").replace("    __stcg", "    if (t == 0) __threadfence();  //-\n    __stcg"),
        grid=3,
        n=192,
        line_of="// sum",
    ),
    Defect(
        "a turn that nobody passes on",
        "waiting",
        _in_turn(**{"pass": ""}),
        grid=3,
        n=192,
        words="another block, which has not run, to write 1 where 0 stands",
        line_of="wait_for_turn",
    ),
    Defect(
        "turns in the order opposite to the blocks'",
        "waiting",
        _in_turn(wait="if (t == 0) wait_for_turn(turn, gridDim.x - 1 - blockIdx.x);"),
        grid=3,
        n=192,
        words="write 2 where 0 stands",
        line_of="gridDim.x - 1",
    ),
    Defect(
        "more static shared memory than a block may have",
        "shared memory",
        _kernel("""
    __shared__ float s[12288];  //+
    __shared__ float s[12289];  //-
    s[t] = x[i];
    y[i] = s[t];"""),
    ),
)
