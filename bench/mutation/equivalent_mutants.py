"""Mutants of the project's kernels that are provably equivalent to the original, each with a one-line proof.

Keyed by mutate.Mutant.key: file, the line, the next line, "before -> after", and the number of the occurrence in the
line. If a key matches several positions, the proof holds for each. "Adds nothing" assumes finite numbers: 0 · x = 0.
"""

from __future__ import annotations

from bench.mutation.mutate import Key

_FOUR = "for (int i = 0; i < 4; i++)"
_FLAT = "for (index_t at = (index_t(blockIdx.x) * FLAT_THREADS + threadIdx.x) * 4; at < {size}; at += stride) {{"
_NOTHING_LEFT = "at = size leaves a count of 0: nothing is read or written, and zeros are added, as epsilon is above 0"
_COUNT = "const int count = params.size - at < 4 ? int(params.size - at) : 4;"
_COUNT_IN_PLACE = "const Four four = load_four(x + at, size - at < 4 ? int(size - at) : 4);"

_WHOLE = (
    "if (t + QUERIES <= n.queries && j + KEYS <= n.keys && j + KEYS <= n.visible(t)) return;",
    "#pragma unroll",
)
_MASK_IDLE = "in a tile with all three every score exists: the mask, where it is applied after all, changes none"
_PAST_QUERIES = (
    "the mask is skipped in more tiles, but their keys exist and are visible: it concerns rows past the last query, of "
    "zeros in Q and dO, whose output is not stored and whose weight, 1, times dO = 0 adds nothing"
)
_HIDDEN = (
    "more tiles of keys, zeros where no key is; every score in them is hidden from every query: its weight is 0, "
    "maxima and sums stay"
)
_PAST_LAST = "more tiles of each head, all past its last query: rows of zeros, no score of which exists, add nothing"
_UNUSED_COPY = (
    "one more tile is copied, zeros where no key is, to the stage not in use; nothing reads or writes it after"
)
_EACH_KEY_TILE = ("for (int begin = 0; begin < n.visible(last - 1); begin += TILE_KEYS) {", "__syncthreads();")
_FIRST_STAGE = "if (at < query_tiles) Stage{stages}.load(q, dout, lse, delta, n, b, h, at * TILE_QUERIES);"
_LOAD_SUMS = (
    "if (turn.place > 0 && first_tile + i < D_TILES) earlier[i] = __ldcg(sums + i * THREADS + threadIdx.x);",
    "}",
)
_STORE_SUMS = (
    "if (!turn.final && first_tile + i < D_TILES)",
    "__stcg(sums + i * THREADS + threadIdx.x, make_float4(v[0], v[1], v[2], v[3]));",
)
_NO_COLUMNS = "more tiles past the head size, for which there are sums, too: they meet no others and none goes to dQ"
_EACH_CHUNK = "for (int c = 0; c < CHUNKS; c++) {"
_NO_CHUNK = "8 * CHUNKS chunks cover PADDED columns, so that the added round is left at once"
_NEXT_FORWARD = ("if (begin + FORWARD_KEYS < end) start(begin + FORWARD_KEYS);", "copy_async_commit();")
_NUMBERS = "copy_async_4(shared + i, numbers + (first + i < limit ? first + i : 0), first + i < limit);"
_OTHER_NUMBER = (
    "places past the last query get the number of query 0; no score exists there, the tile is not whole and so is "
    "masked: weight exp2(-inf - number) = 0, gradient 0"
)
_NOT_READ = "changes the address only where the copy is not valid and reads nothing"

_EQUAL_LAST = "where the two are equal either branch is the last position"
_VOTE = ("if (n + 1 < MATCHES && !__any_sync(FULL_WARP, any)) return;", "#pragma unroll")
_LAST_VOTE = "one vote more, after the last order: whether it returns or the loop ends, nothing follows but no match"

EQUIVALENT: dict[Key, str] = {
    ("adam.cu", _FOUR, "if (i < count) four.v[i] = to_float(p[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FOUR, "if (i < count) store(p + i, four.v[i]);", "< -> <=", 1): "count is at most 4",
    ("adam.cu", _FLAT.format(size="params.size"), _COUNT, "< -> <=", 1): _NOTHING_LEFT,
    ("adam.cu", _FLAT.format(size="size"), _COUNT_IN_PLACE, "< -> <=", 1): _NOTHING_LEFT,
    (
        "attention.cuh",
        "return causal && j > keys - queries ? j - (keys - queries) : 0;",
        "}",
        "> -> >=",
        1,
    ): "where the two are equal their difference is the 0 of the other branch",
    (
        "attention.cuh",
        "__device__ __forceinline__ bool exists(int t, int j) const "
        "{ return t < queries && j < keys && j < visible(t); }",
        "// The score terms of one (batch item, query head), for scores that will be multiplied by `unit`.",
        "< -> <=",
        2,
    ): "for t < queries visible(t) is at most keys, so the third condition implies the second",
    ("attention_float32.cuh", *_EACH_KEY_TILE, "< -> <=", 1): _HIDDEN,
    ("attention_float32.cuh", *_EACH_KEY_TILE, "- -> +", 1): _HIDDEN,
    (
        "attention_float32.cuh",
        "const int last = first + FORWARD_ROWS < n.queries ? first + FORWARD_ROWS : n.queries;",
        "float4 sums[I][CHUNKS] = {};",
        "+ -> -",
        1,
    ): _HIDDEN,
    (
        "attention_float32.cuh",
        "const int last = first + BACKWARD_ROWS < n.queries ? first + BACKWARD_ROWS : n.queries;",
        "const i64 rows = (i64(b) * n.heads + h) * n.queries;",
        "+ -> -",
        1,
    ): _HIDDEN,
    (
        "attention_float32.cuh",
        "for (int first = n.first_query(begin) / BACKWARD_ROWS * BACKWARD_ROWS; first < n.queries;",
        "first += BACKWARD_ROWS) {",
        "< -> <=",
        1,
    ): _PAST_LAST,
    (
        "attention_bfloat16.cuh",
        "const int end = n.visible(last - 1);",
        "const auto start = [&](int begin) {",
        "- -> +",
        1,
    ): _HIDDEN,
    (
        "attention_bfloat16.cuh",
        "const int last = first + FORWARD_ROWS < n.queries ? first + FORWARD_ROWS : n.queries;",
        "const int end = n.visible(last - 1);",
        "+ -> -",
        1,
    ): _HIDDEN,
    (
        "attention_bfloat16.cuh",
        "const int last = first + BACKWARD_ROWS < n.queries ? first + BACKWARD_ROWS : n.queries;",
        "const int end = n.visible(last - 1);",
        "+ -> -",
        1,
    ): _HIDDEN,
    ("attention_bfloat16.cuh", *_NEXT_FORWARD, "< -> <=", 1): _UNUSED_COPY,
    ("attention_bfloat16.cuh", *_NEXT_FORWARD, "+ -> -", 1): _UNUSED_COPY,
    (
        "attention_bfloat16.cuh",
        "const int tiles = (n.queries + KEYS_QUERIES - 1) / KEYS_QUERIES - skipped, steps = tiles * n.group();",
        "const auto stage_of = [&](int step) { return stages + step % 2 * KEYS_STAGE; };",
        "- -> +",
        1,
    ): _PAST_LAST,
    (
        "attention_bfloat16.cuh",
        "const int tiles = (n.queries + KEYS_QUERIES - 1) / KEYS_QUERIES - skipped, steps = tiles * n.group();",
        "const auto stage_of = [&](int step) { return stages + step % 2 * KEYS_STAGE; };",
        "- -> +",
        2,
    ): _PAST_LAST,
    ("attention_fused_bfloat16.cuh", _FIRST_STAGE, "copy_async_commit();", "< -> <=", 1): (
        "equal only without any query, where a load reads nothing and nobody reads what it writes"
    ),
    ("attention_fused_bfloat16.cuh", *_LOAD_SUMS, "< -> <=", 1): _NO_COLUMNS,
    ("attention_fused_bfloat16.cuh", *_LOAD_SUMS, "+ -> -", 1): _NO_COLUMNS,
    ("attention_fused_bfloat16.cuh", *_STORE_SUMS, "< -> <=", 1): _NO_COLUMNS,
    ("attention_fused_bfloat16.cuh", *_STORE_SUMS, "+ -> -", 1): _NO_COLUMNS,
    ("attention_tiles_bfloat16.cuh", *_WHOLE, "<= -> <", 1): _MASK_IDLE,
    ("attention_tiles_bfloat16.cuh", *_WHOLE, "<= -> <", 2): _MASK_IDLE,
    ("attention_tiles_bfloat16.cuh", *_WHOLE, "<= -> <", 3): _MASK_IDLE,
    ("attention_tiles_bfloat16.cuh", *_WHOLE, "+ -> -", 1): _PAST_QUERIES,
    (
        "attention_tiles_bfloat16.cuh",
        *_WHOLE,
        "+ -> -",
        2,
    ): "n.visible(t) is at most n.keys for a query that exists, so the third condition implies the second; other rows: "
    + _PAST_QUERIES,
    ("attention_tiles_bfloat16.cuh", _NUMBERS, "}", "< -> <=", 1): _NOT_READ,
    ("attention_tiles_bfloat16.cuh", _NUMBERS, "}", "+ -> -", 3): _NOT_READ,
    ("attention_tiles_bfloat16.cuh", _NUMBERS, "}", "< -> <=", 2): _OTHER_NUMBER,
    ("attention_tiles_bfloat16.cuh", _NUMBERS, "}", "+ -> -", 5): _OTHER_NUMBER,
    (
        "attention_tiles_bfloat16.cuh",
        "bf16* const p = rows_of + (at < limit ? at * stride : 0);",
        "#pragma unroll",
        "< -> <=",
        1,
    ): "every store through p is guarded by at < limit",
    (
        "attention_tiles_float32.cuh",
        _EACH_CHUNK,
        "if ((x + 8 * c) * 4 >= PADDED) continue;",
        "< -> <=",
        1,
    ): _NO_CHUNK,
    ("attention_tiles_float32.cuh", _EACH_CHUNK, "const int column = (x + 8 * c) * 4;", "< -> <=", 1): _NO_CHUNK,
    ("attention_fused_float32.cuh", _EACH_CHUNK, "const int column = (x + 8 * c) * 4;", "< -> <=", 1): _NO_CHUNK,
    (
        "dropout.cuh",
        "for (u64 block = begin / 4; 4 * block < begin + W; block++) {",
        "words.draw(block);",
        "< -> <=",
        1,
    ): "one evaluation more, which begins where the pack ends: none of its elements is below W",
    (
        "dropout.cuh",
        "if (i < W && words.words[lane] >= threshold) kept |= 1u << i;",
        "}",
        "< -> <=",
        1,
    ): "may set bit W of `kept`, which has 32 and of which only those below W, at most 8, are read",
    (
        "embedding.cu",
        "const int count = rows - begin < SEGMENT ? int(rows - begin) : SEGMENT;",
        "for (int i = threadIdx.x; i < count + 2; i += blockDim.x) {",
        "- -> +",
        1,
    ): "only a last, short segment changes: places past its end are row 0 with token -1; the last run ends before them "
    "as it did, and their sum goes to the last segment's tails, which nothing reads",
    (
        "layernorm.cu",
        "for (int turn = 0; turn < groups; turn++) {" + 28 * " " + "// the warps of the block add up in order",
        "if (turn == group) {",
        "< -> <=",
        1,
    ): "one more turn, which is no group's: only one more barrier, which the whole block reaches",
    (
        "layernorm.cu",
        "for (int p = 0; p < PACKS; p++) {",
        "if (first + p * step >= columns) continue;",
        "< -> <=",
        1,
    ): "warps share the columns only where one can keep them all (_split in cllm_gpu.ops.cuda.layernorm), so that "
    "PACKS * step >= columns and the added round is left at once",
    (
        "score_terms.cuh",
        "constexpr bool SCORE_TERMS = TERM_COUNT > 0;",
        "// Around the tokens of a sequence stands what matches nothing, so that no comparison asks where the sequence "
        "ends:",
        "> -> >=",
        1,
    ): "without terms the kernels then go over the pairs once more and add nothing",
    ("score_terms.cuh", *_VOTE, "< -> <=", 1): _LAST_VOTE,
    ("score_terms.cuh", *_VOTE, "+ -> -", 1): _LAST_VOTE,
    (
        "score_terms.cuh",
        "sums[2] += a.z > b.z ? -dx * scalars[AT_PRIME_DISTANCE] : dx * scalars[AT_PRIME_DISTANCE];",
        "}",
        "> -> >=",
        1,
    ): "a.z and b.z differ: the condition before it says so",
    (
        "rotary.cu",
        "if (valid && head.direction > 0.0f) {",
        "const float u = head.turned(m), v = head.turned(m + head.half);",
        "> -> >=",
        1,
    ): "the direction is 1 or -1",
    (
        "symmetry.cuh",
        "const u32 e = u32(tokens[position < last ? position : last]) % ELEMENTS;",
        "return {turns + e * (2 * PAIRS), e < ROTATIONS ? 0u : 0x80000000u};",
        "< -> <=",
        1,
    ): _EQUAL_LAST,
}
