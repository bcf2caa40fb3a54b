"""Mutation testing of the project's kernels: reports the share of mutants that their tests catch.

    python -m bench.mutation [FILE …] [--kinds A,B] [--limit N] [--seed N] [--seconds N] [--processes N]
                             [--again | --extend]

Files are in cuda/; default: all. Each mutant is checked by the file's tests in tests/ops/cuda, on the simulator with
every memory access checked. A file's entry in bench/results/mutation.json is replaced when all of its mutants, or the
sample drawn by --limit, have been tried. An interrupted run resumes if the kernel source, tests, CUDA operations and
simulator are unchanged; --again discards earlier verdicts. After tests or checks were added, --extend takes over the
mutants caught without them if the source is unchanged; the result records their number. Exit status 1 if less than 95%
of the mutants that are not equivalent are caught.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from bench.mutation import mutate, record
from bench.mutation.equivalent_mutants import EQUIVALENT
from bench.paths import ROOT
from cllm_gpu.ops.cuda import kernel_source
from cllm_gpu.ops.registry import OPERATIONS, operations_on
from cllm_gpu.utils.compiler import require_compiler
from cllm_gpu.utils.library_cache import cache_directory

_PRELOADED = (
    "ml_dtypes",
    "threadpoolctl",
    "cllm_gpu.ops.cuda.device",
    *sorted({f"cllm_gpu.ops.cuda.{OPERATIONS[name].module}" for name in operations_on("cuda")}),
    "cllm_gpu.model.transformer",
    "cllm_gpu.simulator",
)
"""Modules that every check imports; imported once before the fork."""
REQUIRED_SHARE = 0.95
SECONDS_EACH = 1800.0
TEST_SECONDS = 60.0
"""Limit of a test's processor time on a mutant; on the original sources each test takes less than a fifth of it."""
_ROWWISE, _FLAT, _SEQUENCE = (
    "tests/ops/cuda/test_layernorm_gelu_cross_entropy.py",
    "tests/ops/cuda/test_optimizer_steps.py",
    "tests/ops/cuda/test_sequence.py",
)
_ATTENTION = tuple(f"tests/ops/cuda/test_{name}.py" for name in ("tiles", "attention", "score_bias", "symmetry"))
_TURNS = (*_ATTENTION, "tests/ops/cuda/test_attention_fused.py")
_ONE_KERNEL = "(in-one or counters or test_attention_fused)"
Place = tuple[int, str]
"""Offset and kind of a mutant."""
Found = tuple[str, float, bool]
"""Verdict.how, seconds, and whether the verdict is from a run with other tests."""

TESTS: dict[str, tuple[str, ...]] = {
    "adam.cu": (_FLAT,),
    "attention.cu": (*_ATTENTION, "-k", f"not {_ONE_KERNEL}"),
    "attention.cuh": _ATTENTION,
    "attention_bfloat16.cuh": (*_ATTENTION, "-k", f"(bfloat16 or weights) and not {_ONE_KERNEL}"),
    "attention_float32.cuh": (*_ATTENTION, "-k", f"not bfloat16 and not {_ONE_KERNEL}"),
    "attention_fused.cu": (*_TURNS, "-k", _ONE_KERNEL),
    "attention_fused.cuh": (*_TURNS, "-k", _ONE_KERNEL),
    "attention_fused_bfloat16.cuh": (*_TURNS, "-k", f"({_ONE_KERNEL} or conflicts) and not float32"),
    "attention_fused_float32.cuh": (*_TURNS, "-k", f"{_ONE_KERNEL} and not bfloat16"),
    "attention_tiles_bfloat16.cuh": (*_ATTENTION, "-k", f"(bfloat16 or weights) and not {_ONE_KERNEL}"),
    "attention_tiles_float32.cuh": (*_ATTENTION, "-k", f"not bfloat16 and not {_ONE_KERNEL}"),
    "column_sum.cu": (_ROWWISE, "tests/ops/cuda/test_linear.py", "-k", "column_sum or linear"),
    "columns.cuh": (_ROWWISE, "-k", "column_sum or gelu_backward"),
    "common.cuh": ("tests/simulator/test_common.py", _ROWWISE, "-k", "test_common or layernorm_forward"),
    "cross_entropy.cu": (_ROWWISE, "-k", "cross_entropy"),
    "dropout.cuh": (_SEQUENCE, "-k", "dropout"),
    "embedding.cu": (_SEQUENCE, "-k", "embedding or runs"),
    "gelu.cu": (_ROWWISE, "-k", "gelu"),
    "layernorm.cu": (_ROWWISE, "-k", "layernorm"),
    "philox.cuh": (_SEQUENCE, _FLAT, "-k", "dropout or draws_the_references_bits"),
    "rotary.cu": (_SEQUENCE, "tests/ops/cuda/test_symmetry.py", "-k", "rotary"),
    "score_terms.cuh": ("tests/ops/cuda/test_score_bias.py",),
    "storage.cuh": (_ROWWISE, _SEQUENCE),
    "step.cu": ("tests/ops/cuda/test_step_decision.py",),
    "symmetry.cuh": ("tests/ops/cuda/test_symmetry.py",),
    "symmetry_bfloat16.cuh": ("tests/ops/cuda/test_symmetry.py", "-k", "bfloat16"),
}
"""Source → pytest arguments that select its tests."""


class _Judge:
    """A pytest plugin that sorts tests by mutants caught before, and stores the first line of the first failure."""

    def __init__(self, caught: Mapping[str, int], seconds: float) -> None:
        self._caught, self._seconds = caught, seconds
        self.message = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: -self._caught.get(item.nodeid, 0))

    def pytest_runtest_setup(self) -> None:
        mutate.limit_processor_time(self._seconds)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.message:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = (crash.message if crash else str(report.longrepr)).strip()
            self.message = f"{report.nodeid}: {text.partition(chr(10))[0]}"


def check(tests: Sequence[str], caught: Mapping[str, int], compiled: Path, folder: Path) -> None:
    """Run the tests on the sources in `folder`; `compiled` is the cache folder.

    caught: test → number of mutants it caught before; these run first. Raises AssertionError "test: message" for the
    first failure.
    """
    kernel_source.source_directory = lambda: folder
    kernel_source.load_source.cache_clear()
    kernel_source.kernel_parameters.cache_clear()
    os.environ |= {"CLLM_SIMULATOR_CHECK": "1", "CLLM_CACHE_DIR": str(compiled), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sound = all(path.read_bytes() == (folder / path.name).read_bytes() for path in (ROOT / "cuda").iterdir())
    judge = _Judge(caught, TEST_SECONDS / 5 if sound else TEST_SECONDS)
    options = ["-x", "-q", "--slow", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    status = pytest.main([*options, *tests], plugins=[judge])
    if status != pytest.ExitCode.OK:
        raise AssertionError(judge.message or f"pytest ended with {status!r}")


class Journal:
    """Verdicts of a file's mutants, stored in the cache and valid while everything they depend on is unchanged."""

    def __init__(self, file: str, text: str, *, again: bool, extend: bool) -> None:
        folder, own = cache_directory() / "mutation", f"{file}-{record.digest([text])[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{own}-{_dependency_hash(file)}.jsonl"
        if again:
            self._path.unlink(missing_ok=True)
        self._there = {(mutant.start, mutant.kind): mutant for mutant in mutate.mutants(file, text)}
        self._verdicts = dict(_read(self._path))
        self.caught: Counter[str] = Counter()
        """Test → number of mutants it caught."""
        for how, _, _ in self._verdicts.values():
            self.caught[_test(how)] += 1
        for earlier in sorted(folder.glob(f"{own}-*.jsonl")) if extend else ():
            self._take_over(earlier)
        self._whole = sum(mutant.key not in EQUIVALENT for mutant in self._there.values())

    def _take_over(self, earlier: Path) -> None:
        """Add mutants caught in an earlier run with other tests."""
        for place, (how, seconds, _) in _read(earlier):
            if how != "survived" and place not in self._verdicts:
                self._keep(place, (how, seconds, True))

    def _keep(self, place: Place, found: Found) -> None:
        self._verdicts[place] = found
        self.caught[_test(found[0])] += 1
        with self._path.open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([place, found]) + "\n")

    @property
    def known(self) -> list[mutate.Verdict]:
        """The verdicts so far."""
        return [
            mutate.Verdict(self._there[place], how != "survived", how, seconds=seconds)
            for place, (how, seconds, _) in self._verdicts.items()
        ]

    @property
    def taken_over(self) -> int:
        """Number of verdicts from runs with other tests."""
        return sum(taken for _, _, taken in self._verdicts.values())

    def add(self, verdict: mutate.Verdict) -> None:
        """Store a verdict and print it."""
        mutant = verdict.mutant
        self._keep((mutant.start, mutant.kind), (verdict.how, round(verdict.seconds, 2), False))
        word = "caught" if verdict.caught else "SURVIVED"
        print(f"{len(self._verdicts)}/{self._whole} {word}: {mutant}: {verdict.how}", flush=True)


def _read(path: Path) -> Iterator[tuple[Place, Found]]:
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        (start, kind), (how, seconds, taken) = json.loads(line)
        yield (start, kind), (how, seconds, taken)


def _test(how: str) -> str:
    return how.partition(": ")[0]


def _dependency_hash(file: str) -> str:
    """Hash of everything that a verdict on a mutant of `file` depends on."""
    python = [*(ROOT / "cllm_gpu" / "ops" / "cuda").rglob("*.py"), *(ROOT / "cllm_gpu" / "simulator").rglob("*.?pp")]
    python += [*(ROOT / "cllm_gpu" / "simulator").rglob("*.py"), *(ROOT / "cllm_gpu" / "simulator").rglob("*.h")]
    paths = [*_related_sources(file), *python, *(ROOT / name for name in record.test_files(TESTS[file]))]
    return record.digest([*TESTS[file], *(path.read_text(encoding="utf-8") for path in sorted(paths))])[:32]


def _related_sources(file: str) -> list[Path]:
    """The sources compiled together with `file`: those that include it, and everything they include."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "cuda").iterdir()}
    included = {name: set(re.findall(r'#include "([^"]+)"', text)) for name, text in texts.items()}

    def closure(name: str) -> set[str]:
        return {name}.union(*map(closure, included[name]))

    return [ROOT / "cuda" / name for name in set().union(*(closure(n) for n in texts if file in closure(n)))]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", choices=[[], *TESTS], metavar="FILE")
    parser.add_argument("--kinds", default="", help="such as 'barrier removed,wait removed'; default: all")
    parser.add_argument("--limit", type=int, default=None, help="maximum number of mutants per file")
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing mutants with --limit")
    parser.add_argument("--seconds", type=float, default=None, help="time limit per file; default: none")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sound", action="store_true", help="skip the check of the original sources, known to pass")
    parser.add_argument("--again", action="store_true", help="discard earlier verdicts")
    parser.add_argument("--extend", action="store_true", help="after adding tests: try only mutants not caught before")
    return parser.parse_args()


def judge(file: str, asked: argparse.Namespace, compiled: Path) -> mutate.Report:
    """Try the mutants of one file; writes the result file if all requested mutants were tried."""
    text = (ROOT / "cuda" / file).read_text(encoding="utf-8")
    journal = Journal(file, text, again=asked.again, extend=asked.extend)
    report = mutate.run(
        ROOT / "cuda",
        [file],
        functools.partial(check, TESTS[file], journal.caught, compiled),
        kinds=[kind for kind in asked.kinds.split(",") if kind],
        limit=asked.limit,
        seed=asked.seed,
        seconds=asked.seconds,
        seconds_each=SECONDS_EACH,
        processes=asked.processes,
        sound_first=not asked.sound,
        equivalent=EQUIVALENT,
        known=journal.known,
        progress=journal.add,
    )
    complete = report.untried == 0 or (asked.limit is not None and len(report.counted) >= asked.limit)
    if complete and not asked.kinds:
        record.merge(file, record.entry(file, text, TESTS[file], report, journal.taken_over), TESTS)
    return report


def main() -> int:
    """Run the requested files and print their reports."""
    asked = _arguments()
    os.chdir(ROOT)
    require_compiler()
    np.seterr(all="ignore")
    for module in _PRELOADED:
        importlib.import_module(module)
    total = mutate.Report()
    with tempfile.TemporaryDirectory() as compiled:
        for file in asked.files or TESTS:
            report = judge(file, asked, Path(compiled))
            print(f"{file}\n{report}\n", flush=True)
            total.verdicts += report.verdicts
            total.untried += report.untried
    print(f"all files\n{total}")
    return 0 if total.share >= REQUIRED_SHARE else 1


if __name__ == "__main__":
    raise SystemExit(main())
