"""The committed mutation run is of these sources and catches what it must; how results are counted and merged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench.mutation import __main__ as bench_mutation
from bench.mutation import record
from bench.mutation.__main__ import REQUIRED_SHARE, TESTS, Journal
from bench.mutation.equivalent_mutants import EQUIVALENT
from bench.mutation.mutate import Mutant, Report, Verdict, mutants

CUDA = record.ROOT / "cuda"
LEAST_OF_A_FILE = 0.9
LEAST_SAMPLE = 16
"""Mutants that are tried where not all of a file's are."""
SOURCE = "int f(int a) {\n    return a < 3 ? a + 1 : a - 1;\n}\n"


def _committed() -> dict[str, Any]:
    return record.load()["files"]


def test_every_source_has_a_result() -> None:
    """Of a source with nothing to mutate there is nothing to tell."""
    there = {path.name for path in CUDA.iterdir() if mutants(path.name, path.read_text(encoding="utf-8"))}
    assert there <= set(TESTS)
    assert set(_committed()) == set(TESTS)


@pytest.mark.parametrize("file", sorted(TESTS))
def test_the_result_is_of_the_source_as_it_is(file: str) -> None:
    """Same mutants, all tried or a sample, the same left out as equivalent, nine tenths of the others caught."""
    found, text = _committed()[file], (CUDA / file).read_text(encoding="utf-8")
    stale = f"the mutation run of {file} is stale: run python -m bench.mutation {file}"
    assert found["mutants_sha256"] == record.mutants_digest(file, text), stale
    assert found["tests"] == " ".join(TESTS[file]), stale
    expected = Counter((m.context, EQUIVALENT[m.key]) for m in mutants(file, text) if m.key in EQUIVALENT)
    assert Counter((place["in"], place["reason"]) for place in found["equivalent"]) == expected, stale
    tried = sum(kind["tried"] - kind["equivalent"] for kind in found["kinds"].values())
    assert found["untried"] == 0 or tried >= LEAST_SAMPLE
    assert found["share"] >= LEAST_OF_A_FILE


def test_the_required_share_is_caught() -> None:
    found = record.load()
    assert found["total"] == record.total(_committed())
    assert found["total"]["share"] >= REQUIRED_SHARE
    survivors = sum(len(entry["survivors"]) for entry in _committed().values())
    assert survivors == found["total"]["tried"] - found["total"]["equivalent"] - found["total"]["caught"]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("timed out", "timed out"),
        ("crashed", "crashed"),
        (
            "cllm_gpu.simulator.errors.KernelError: kernel k, line 3, block (0, 0, 0): out of range: reads",
            "out of range",
        ),
        ("simulator.errors.KernelError: kernel k, line 3: race: writes byte 0", "race"),
        ("cllm_gpu.utils.errors.UserError: the simulator cannot compile the CUDA source: error", "does not compile"),
        ("AssertionError: dx (float32): error 1 passes its bound by 0.5", "wrong result"),
    ],
)
def test_ways_of_catching(how: str, expected: str) -> None:
    assert record.cause(how) == expected


def _report(how: dict[str, str]) -> Report:
    """Each mutant of SOURCE with the verdict found under its replacement text; "" is an equivalent one."""
    verdicts = []
    for mutant in mutants("f.cu", SOURCE):
        said = how[mutant.after]
        verdicts.append(Verdict(mutant, said not in ("", "survived"), said, equivalent=not said, seconds=1.25))
    return Report(verdicts)


def test_an_entry_counts_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = _report({"<=": "timed out", "-": "survived", "+": ""})
    tests = ("tests/bench/mutation/test_record.py", "-k", "entry")
    found = record.entry("f.cu", SOURCE, tests, report, 1)
    assert found["kinds"] == {
        "bound moved": {"tried": 1, "caught": 1, "equivalent": 0},
        "sign changed": {"tried": 2, "caught": 0, "equivalent": 1},
    }
    assert found["share"] == 0.5
    assert found["ways"] == {"timed out": 1}
    assert [place["change"] for place in found["survivors"]] == ["+ -> -"]
    assert "tests/conftest.py" in found["tests_sha256"]
    monkeypatch.setattr(record, "RESULT", tmp_path / "mutation.json")
    for file in ("f.cu", "g.cu", "gone.cu"):
        record.merge(file, found, ("f.cu", "g.cu", "gone.cu"))
    record.merge("g.cu", found | {"seconds": 7}, ("f.cu", "g.cu"))
    written = json.loads((tmp_path / "mutation.json").read_text(encoding="utf-8"))
    assert list(written["files"]) == ["f.cu", "g.cu"]
    assert written["total"] == {"tried": 6, "caught": 2, "equivalent": 2, "untried": 0, "share": 0.5, "seconds": 11}
    assert "| `f.cu` | 3 | 1 | 2 | 1 | 50.0% |" in record.table()


def test_the_digest_of_mutants_sees_code_and_no_comments() -> None:
    commented = SOURCE.replace("int f", "// a < b - c\nint f")
    moved = SOURCE.replace("a + 1", "a + 2")
    assert record.mutants_digest("f.cu", SOURCE) == record.mutants_digest("f.cu", commented)
    assert record.mutants_digest("f.cu", SOURCE) != record.mutants_digest("f.cu", moved)
    assert all(isinstance(mutant, Mutant) for mutant in mutants("f.cu", SOURCE))


def test_a_journal_goes_on_and_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run knows all it judged; with other tests only what was caught, and only when asked."""
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    text = (CUDA / "philox.cuh").read_text(encoding="utf-8")
    first, second = mutants("philox.cuh", text)[:2]
    verdicts = [Verdict(first, True, "tests/t.py::t: wrong", seconds=1.5), Verdict(second, False, "survived")]
    journal = Journal("philox.cuh", text, again=False, extend=False)
    for verdict in verdicts:
        journal.add(verdict)
    again = Journal("philox.cuh", text, again=False, extend=False)
    assert again.known == verdicts
    assert again.caught["tests/t.py::t"] == 1
    monkeypatch.setattr(bench_mutation, "_dependency_hash", lambda _: "other tests")
    assert Journal("philox.cuh", text, again=False, extend=False).known == []
    for _ in range(2):  # the second finds what the first took over
        extended = Journal("philox.cuh", text, again=False, extend=True)
        assert extended.known == verdicts[:1]
        assert extended.taken_over == 1
    assert Journal("philox.cuh", text, again=True, extend=False).known == []
