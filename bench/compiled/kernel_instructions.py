"""Counts the instructions that the lattice adds to the attention kernels in the compiled code; no GPU needed.

    python -m bench.compiled.kernel_instructions --bpe FILE        writes bench/results/lattice_instructions.json

FILE: python -m cllm_gpu tokenize stdlib --vocabulary 8192 --output FILE. Needs the wheels nvidia-cuda-nvrtc-cu12 and
nvidia-cuda-nvdisasm. The bf16 kernels are compiled for sm_90 with several choices of terms, and with the symmetry. The
count is the instructions that a warp issues in a steady iteration of the main loop (`disassembly`), divided by the
query-key pairs of a thread in it. The code for longer matches runs only while a group of 128 pairs still matches, so
there are several counts:

    least       no pair matches
    a text      the fraction of matching groups in sequences of the standard library, as bytes or BPE tokens
    most        every group matches in all orders

No time is measured. The ratio of two counts is the slowdown if both kernels are limited by instruction issue; it does
not include waiting for memory, tensor cores, or the slower pipes of integers and special functions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.compiled.disassembly import Kernel, MainLoop, disassemble, nvdisasm_version
from bench.compiled.match_groups import shares
from bench.compiled.nvrtc import machine_code_of, nvrtc_version
from bench.paths import RESULTS
from cllm_gpu.data import open_dataset
from cllm_gpu.data.tokenizers import Tokenizer, load_tokenizer
from cllm_gpu.ops.cuda import attention, attention_fused
from cllm_gpu.ops.cuda.score_bias import score_bias_defines
from cllm_gpu.ops.cuda.variant import Variant
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES, ScoreBias
from cllm_gpu.utils.errors import UserError
from cllm_gpu.utils.library_cache import cache_directory
from cllm_gpu.utils.versions import environment

RESULT = RESULTS / "lattice_instructions.json"
ARCHITECTURE, STORAGE, HEAD_SIZES = "sm_90", "bfloat16", (64, 128)
TILE_PAIRS = 4
"""Pairs per thread in a warp's 16×8 tile of scores."""
LEAST, MOST = "least", "most"


def _score_bias(matches: int, *, same_token: bool = False, distances: bool = False) -> ScoreBias:
    return ScoreBias(None, None, None, distances, distances, same_token, matches)


STANDARD, SYMMETRY = "standard", "symmetry on a quarter"
CHOICES: dict[str, ScoreBias | None] = {
    STANDARD: None,
    "matches 1": _score_bias(1),
    "matches to 3": _score_bias(3),
    "matches to 8": _score_bias(8),
    "same token, matches to 3": _score_bias(3, same_token=True),
    "same token, matches to 8": _score_bias(8, same_token=True),
    "all terms": _score_bias(8, same_token=True, distances=True),
    SYMMETRY: None,
}


@dataclass(frozen=True)
class Work:
    """How a kernel processes a tile of scores."""

    source: str
    kernel: str
    products: int
    """Matrix products over the head size: each takes D/16 tensor-core instructions for a 16×8 tile of scores."""
    comparisons: int
    """How often the tokens of a tile are compared, for the scores and for the gradients of the scalars."""
    group: tuple[int, int]
    """Queries and keys of a 16×8 tile."""


FORWARD = Work("attention.cu", "attention_forward", 2, 1, (16, 8))
QUERIES = Work("attention.cu", "attention_backward_queries", 3, 2, (16, 8))
KEYS = Work("attention.cu", "attention_backward_keys", 4, 1, (8, 16))
FUSED = Work("attention_fused.cu", "attention_backward_fused", 5, 2, (8, 16))
WORKS = (FORWARD, QUERIES, KEYS, FUSED)
TOTALS = {"two kernels": (FORWARD, QUERIES, KEYS), "fused": (FORWARD, FUSED)}
"""Backward method → the kernels that process every pair once, including the forward."""


def threads_and_rows(work: Work, head_size: int, score_bias: ScoreBias | None) -> tuple[int, int]:
    """Threads per block, and the rows that a block keeps while it iterates over those of the other side."""
    if work is FUSED:
        fused = attention_fused.tiles_of(STORAGE, head_size, score_bias)
        return fused.threads, fused.keys
    tiles = attention.tiles_of(STORAGE, head_size, score_bias)
    rows = {FORWARD: tiles.forward_rows, QUERIES: tiles.query_rows, KEYS: tiles.key_rows}
    return attention.THREADS, rows[work]


def count(
    work: Work, kernel: Kernel, head_size: int, score_bias: ScoreBias | None, cases: dict[str, list[float]]
) -> dict[str, Any]:
    """Case → class → instructions per pair, and the tiles per iteration.

    Raises UserError if the loop does not have the structure expected from the sources.
    """
    loop = MainLoop(kernel)
    tiles, rest = divmod(loop.tensor_instructions, work.products * head_size // 16)
    threads, rows = threads_and_rows(work, head_size, score_bias)
    moving = 8 * tiles * threads // 32 * 16 // rows  # rows of the other side per iteration
    orders = score_bias.matches if score_bias else 0
    expected = tiles * work.comparisons if orders > 1 else 0
    if rest or loop.ladders != expected or (expected and not orders - 2 <= loop.orders <= orders):
        raise UserError(
            f"{kernel.name}: {loop.tensor_instructions} tensor-core instructions and {loop.ladders} groups of "
            f"{loop.orders} votes in the loop; {expected} groups were expected"
        )
    copies = 2 * moving * head_size // 8 // threads
    return {
        "tiles": tiles,
        "instructions_per_pair": {
            case: {kind: round(number / (TILE_PAIRS * tiles), 4) for kind, number in loop.counts(copies, share).items()}
            for case, share in cases.items()
        },
    }


def kernels_of(source: str, head_size: int, choice: str) -> dict[str, Kernel]:
    """The compiled kernels of one source with one of CHOICES, by name. Raises UserError if a tool is missing."""
    turned = (("SYMMETRY_PAIRS", head_size // 8),) if choice == SYMMETRY else ()
    defines = (("HEAD_SIZE", head_size), *score_bias_defines(CHOICES[choice]), *turned)
    return disassemble(machine_code_of(Variant(source, STORAGE, defines=defines), ARCHITECTURE))


def rows_of(choice: str, head_size: int, texts: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row per kernel with one choice of terms."""
    score_bias = CHOICES[choice]
    kernels = {source: kernels_of(source, head_size, choice) for source in dict.fromkeys(work.source for work in WORKS)}
    rows = []
    for work in WORKS:
        cases = {LEAST: [], **{text: of[shape_name(work.group)] for text, of in texts.items()}}
        cases[MOST] = [1.0] * MAXIMUM_MATCHES
        found = count(work, kernels[work.source][f"{work.kernel}_{STORAGE}"], head_size, score_bias, cases)
        rows.append({"kernel": work.kernel, "head_size": head_size, "terms": choice, **found})
    return rows


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward and backward together: instructions per pair in every case, and ratios to standard attention."""
    sums: dict[tuple[int, str, str], dict[str, float]] = {}
    for row in rows:
        for method, works in TOTALS.items():
            if row["kernel"] in {work.kernel for work in works}:
                of = sums.setdefault((row["head_size"], method, row["terms"]), {})
                for case, kinds in row["instructions_per_pair"].items():
                    of[case] = of.get(case, 0.0) + sum(kinds.values())
    return [
        {
            "head_size": size,
            "backward": method,
            "terms": choice,
            "instructions_per_pair": {case: round(number, 2) for case, number in of.items()},
            "ratio_to_standard": {
                case: round(number / sums[size, method, STANDARD][case], 3) for case, number in of.items()
            },
        }
        for (size, method, choice), of in sums.items()
    ]


def shape_name(group: tuple[int, int]) -> str:
    """The name of a group's shape, such as "16 queries by 8 keys"."""
    return f"{group[0]} queries by {group[1]} keys"


def sequences(tokenizer: Tokenizer, count: int, length: int) -> list[npt.NDArray[np.int32]]:
    """`count` token sequences of the standard library, spread evenly over its validation part."""
    data = open_dataset(
        "stdlib",
        tokenizer=tokenizer,
        validation_fraction=0.05,
        seed=1,
        cache_folder=cache_directory(),
        context=length,
    ).validation
    starts = np.linspace(0, len(data) - length, count).astype(int)
    return [data.read(int(start), length) for start in starts]


def measure(bpe: Path, count: int, length: int) -> dict[str, Any]:
    """The content of the result file; two compilations at a time. Raises UserError if a tool is missing."""
    nvrtc, nvdisasm = ".".join(map(str, nvrtc_version())), nvdisasm_version()
    tokenizers = {"bytes": load_tokenizer("bytes"), "BPE": load_tokenizer(str(bpe))}
    texts = {}
    for name, tokenizer in tokenizers.items():
        read = sequences(tokenizer, count, length)
        texts[name] = {shape_name(group): shares(read, *group) for group in (FORWARD.group, KEYS.group)}
    with ThreadPoolExecutor(2) as pool:
        jobs = [(choice, size) for size in HEAD_SIZES for choice in CHOICES]
        rows = [row for found in pool.map(lambda job: rows_of(job[0], job[1], texts), jobs) for row in found]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "made": environment(),
        "architecture": ARCHITECTURE,
        "storage": STORAGE,
        "nvrtc": nvrtc,
        "nvdisasm": nvdisasm,
        "text": {"corpus": "stdlib, validation part", "sequences": count, "length": length},
        "vocabularies": {name: tokenizer.vocabulary for name, tokenizer in tokenizers.items()},
        "share_of_groups_matching": texts,
        "totals": totals(rows),
        "kernels": rows,
    }


def print_totals(found: list[dict[str, Any]]) -> None:
    """Print a line per choice of terms."""
    for row in found:
        numbers = "".join(
            f"{case:>8}{number:8.1f} ({row['ratio_to_standard'][case]:.2f})"
            for case, number in row["instructions_per_pair"].items()
        )
        print(f"D={row['head_size']:<4}{row['backward']:12}{row['terms']:26}{numbers}")


def as_text(report: dict[str, Any]) -> str:
    """The report as JSON, with a line per row of its tables."""
    parts = {}
    for name, value in report.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        parts[name] = f"[\n  {rows}\n ]" if rows else json.dumps(value)
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {part}" for name, part in parts.items()) + "\n}\n"


def main() -> int:
    """Compile, count, write and print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bpe", type=Path, required=True, help="tokenizer.json of the BPE vocabulary")
    parser.add_argument("--sequences", type=int, default=8, help="of each text, for the share of matches")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence, a multiple of 16")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.sequences < 1 or options.length < 16 or options.length % 16:
        parser.error("--sequences must be at least 1, and --length a multiple of 16")
    try:
        report = measure(options.bpe, options.sequences, options.length)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(as_text(report), encoding="utf-8")
    print_totals(report["totals"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
