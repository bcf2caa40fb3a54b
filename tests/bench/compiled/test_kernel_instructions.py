"""Instruction counts of attention's main loops: the reading of a disassembly, the shares of matches, the real thing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bench.compiled import disassembly, match_groups, nvrtc
from bench.compiled import kernel_instructions as bench
from cllm_gpu.ops.reference.score_bias import MAXIMUM_MATCHES
from cllm_gpu.utils.errors import UserError

MISSING = disassembly.find_nvdisasm() is None or nvrtc.load_nvrtc() is None
needs_tools = pytest.mark.skipif(MISSING, reason="not run: nvdisasm or NVRTC is not installed")

PROLOGUE = """
        .type           attention_toy,@function
.text.attention_toy:
        S2R R0, SR_TID.X
.L_copies_before_the_loop:
        LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]
        @!P0 BRA `(.L_copies_before_the_loop)
.L_main:
"""
COPIES = """
        @P0 BRA `(.L_no_next_tile)
.L_copy:
        ISETP.GE.AND P1, PT, R0, 0x80, PT
        @!P2 BRA `(.L_narrow)
        LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]
        BRA `(.L_copied)
.L_narrow:
        LDG.E.U16 R5, desc[UR4][R2.64]
        STS.U16 [R1], R5
        STS.U16 [R1], R5
.L_copied:
        @!P1 BRA `(.L_copy)
.L_no_next_tile:
        BAR.SYNC.DEFER_BLOCKING 0x0
        LDSM.16.M88.4 R8, [R3]
        HMMA.16816.F32.BF16 R12, R8, R10, RZ
"""
MATCHES = """
        ISETP.EQ.AND P3, PT, R20, R21, PT
        PLOP3.LUT P6, P4, P3, P5, PT, 0xa8, 0x0
        VOTE.ANY P4, P4
        @!P4 BRA `(.L_matched)
        @P3 FADD.FTZ R12, R12, R30
        ISETP.EQ.AND P3, PT, R22, R23, P3
        VOTE.ANY P4, P3
        @!P4 BRA `(.L_matched)
        @P3 FADD.FTZ R12, R12, R31
        LDG.E R24, desc[UR4][R6.64]
        ISETP.EQ.AND P3, PT, R24, R25, P3
        VOTE.ANY P6, P3
        @P6 FADD.FTZ R12, R12, R32
.L_matched:
"""
TURN = """
        ISETP.GE.AND P6, PT, R0, 0x10, PT
        @P6 BRA `(.L_no_share)
        LDS.128 R4, [R3]
        FMUL.FTZ R4, R4, R5
        STS.128 [R3], R4
.L_no_share:
"""
SOFTMAX = """
        @P0 BRA P1, `(.L_whole_tile)
        FSEL R12, R12, -INF , P2
        FSEL R13, R13, -INF , P2
.L_whole_tile:
        BRA.DIV UR4, `(.L_same_maximum)
        MUFU.EX2 R12, R12
        FSETP.NEU.FTZ.AND P4, PT, R14, 1, PT
        VOTE.ANY P4, P4
        @!P4 BRA `(.L_same_maximum)
        FMUL.FTZ R16, R16, R14
        FMUL.FTZ R17, R17, R14
.L_same_maximum:
        @!P5 BRA `(.L_main)
        EXIT
.L_end:
        BRA `(.L_end)
"""
CLASSES_WITHOUT_MATCHES = {
    "tensor core": 1, "matrix load": 1, "special function": 1, "float": 1,
    "integer, compare": 1, "load, store": 1, "branch, vote, exchange": 10, "other": 0,
}  # fmt: skip
"""Of PROLOGUE + COPIES + SOFTMAX with one trip around the copy."""


def listing(*parts: str) -> str:
    """The parts as nvdisasm prints instructions: with addresses and semicolons."""
    lines, address = [], 0
    for line in "".join(parts).splitlines():
        text = line.strip()
        if text and not text.startswith("."):
            lines.append(f"        /*{address:04x}*/                   {text} ;")
            address += 16
        else:
            lines.append(line)
    return "\n".join(lines)


def loop_of(*parts: str) -> disassembly.MainLoop:
    return disassembly.MainLoop(disassembly.parse(listing(*parts))["attention_toy"])


def test_a_steady_iteration_copies_aligned_masks_nothing_and_rescales_nothing() -> None:
    loop = loop_of(PROLOGUE, COPIES, SOFTMAX)
    assert (loop.tensor_instructions, loop.ladders, loop.orders) == (1, 0, 0)
    assert loop.counts(copies=1) == CLASSES_WITHOUT_MATCHES


def test_a_copying_loop_runs_as_often_as_the_copies_need() -> None:
    once, thrice = (loop_of(PROLOGUE, COPIES, SOFTMAX).counts(copies) for copies in (1, 3))
    added = {kind: thrice[kind] - once[kind] for kind in once if thrice[kind] != once[kind]}
    assert added == {"integer, compare": 2, "load, store": 2, "branch, vote, exchange": 6}


def test_a_copy_outside_the_loops_runs_once() -> None:
    unrolled = COPIES.replace("BAR.SYNC", "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]\n        BAR.SYNC")
    loop = loop_of(PROLOGUE, unrolled, SOFTMAX)
    assert loop.counts(copies=3)["load, store"] == 3
    with pytest.raises(UserError, match="attention_toy: 1 copies a thread, but 1 in loops and 1 outside"):
        loop.counts(copies=1)


def test_a_thread_has_its_share_of_what_is_turned() -> None:
    with_turn, without = (loop_of(PROLOGUE, part, COPIES, SOFTMAX).counts(copies=1) for part in (TURN, ""))
    added = {kind: with_turn[kind] - without[kind] for kind in without if with_turn[kind] != without[kind]}
    assert added == {"integer, compare": 1, "load, store": 2, "float": 1, "branch, vote, exchange": 1}


@pytest.mark.parametrize(
    ("shares", "added"),
    [
        ((), 4.0),  # compare, join, vote, leave
        ((0.0, 0.0, 0.0), 4.0),
        ((1.0, 0.0, 0.0), 8.0),
        ((1.0, 1.0, 1.0), 13.0),
        ((1.0, 1.0, 0.0), 13.0),  # the last order has no branch behind its vote
        ((0.5, 0.25, 0.125), 4.0 + 0.5 * 4 + 0.25 * 5),
    ],
)
def test_matches_cost_what_the_share_of_groups_that_go_on_says(shares: tuple[float, ...], added: float) -> None:
    loop = loop_of(PROLOGUE, COPIES, MATCHES, SOFTMAX)
    assert (loop.ladders, loop.orders) == (1, 2)
    found = sum(loop.counts(1, shares).values()) - sum(CLASSES_WITHOUT_MATCHES.values())
    assert found == pytest.approx(added, abs=1e-12)


def test_every_group_of_pairs_has_orders_of_its_own() -> None:
    second = MATCHES.replace(".L_matched", ".L_matched_too")
    loop = loop_of(PROLOGUE, COPIES, MATCHES, second, SOFTMAX)
    assert (loop.ladders, loop.orders) == (2, 2)


def test_a_kernel_without_tensor_cores_has_no_main_loop() -> None:
    with pytest.raises(UserError, match="attention_toy has no loop with HMMA instructions"):
        loop_of(PROLOGUE, COPIES.replace("HMMA.16816.F32.BF16", "FFMA.FTZ"), SOFTMAX)


def test_instructions_fall_into_their_kinds() -> None:
    wanted = {
        "HMMA.16816.F32.BF16": "tensor core", "LDSM.16.MT88.4": "matrix load", "MUFU.SQRT": "special function",
        "FADD.FTZ": "float", "FMNMX.FTZ": "float", "F2FP.BF16.F32.PACK_AB": "float", "IMAD.MOV.U32": "integer, compare",
        "UIADD3": "integer, compare", "VIADDMNMX": "integer, compare", "ISETP.EQ.AND": "integer, compare",
        "LDG.E": "load, store", "ULDC.64": "load, store", "STL.64": "load, store", "LDGDEPBAR": "load, store",
        "VOTE.ANY": "branch, vote, exchange", "SHFL.BFLY": "branch, vote, exchange", "CS2R": "other", "MOV": "other",
    }  # fmt: skip
    assert {opcode: disassembly.Instruction(opcode, (), "", "").kind for opcode in wanted} == wanted


def _longest_by_hand(tokens: Any, i: int, j: int) -> int:
    """Match length of one pair, by the definition."""
    length = 0
    while length < MAXIMUM_MATCHES and i - length >= 0 and j - 1 - length >= 0:
        if tokens[i - length] != tokens[j - 1 - length]:
            break
        length += 1
    return length


@pytest.mark.parametrize("group", [(16, 8), (8, 16)])
@pytest.mark.parametrize("vocabulary", [2, 5, 1000])
def test_shares_of_groups_equal_a_search_through_all_pairs(group: tuple[int, int], vocabulary: int) -> None:
    sequences = np.random.default_rng(vocabulary).integers(0, vocabulary, (2, 48)).astype(np.int32)
    longest = []
    for tokens in sequences:
        for t in range(0, 48, group[0]):
            for s in range(0, 48, group[1]):
                pairs = [(i, j) for i in range(t, t + group[0]) for j in range(s, s + group[1])]
                if any(j <= i for i, j in pairs):
                    longest.append(max(_longest_by_hand(tokens, i, j) for i, j in pairs))
    wanted = [sum(found >= order for found in longest) / len(longest) for order in range(1, MAXIMUM_MATCHES + 1)]
    assert match_groups.shares(sequences, *group) == pytest.approx(wanted, abs=1e-5)


@needs_tools
@pytest.mark.parametrize("choice", [bench.STANDARD, bench.SYMMETRY, "same token, matches to 3"])
def test_the_compiled_kernel_is_counted(choice: str) -> None:
    """Every product of a 16×8 tile takes D/16 tensor-core instructions, whatever the terms; more matches take more."""
    work, size, terms = bench.FUSED, 64, bench.CHOICES[choice]
    kernel = bench.kernels_of(work.source, size, choice)[f"{work.kernel}_{bench.STORAGE}"]
    cases = {"least": [], "half": [0.5] * 8, "most": [1.0] * 8}
    found = bench.count(work, kernel, size, terms, cases)["instructions_per_pair"]
    assert all(kinds["tensor core"] == work.products * size / 16 / bench.TILE_PAIRS for kinds in found.values())
    assert all(kinds["special function"] == 1.0 for kinds in found.values()), "an exponential for each pair"
    least, half, most = (sum(found[case].values()) for case in cases)
    if terms is None:
        assert least == half == most
    else:
        assert least < half < most
        assert half == pytest.approx((least + most) / 2, abs=1e-3)


def test_the_committed_result_adds_up() -> None:
    found = json.loads(bench.RESULT.read_text(encoding="utf-8"))
    assert bench.totals(found["kernels"]) == found["totals"]
    assert {row["terms"] for row in found["totals"]} == set(bench.CHOICES)
    for row in found["totals"]:
        ratios = row["ratio_to_standard"]
        assert ratios["least"] <= ratios["BPE"] <= ratios["most"]
        assert ratios["least"] <= ratios["bytes"] <= ratios["most"]
