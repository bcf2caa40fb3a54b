"""The committed result of mutation testing: one entry per source, merged when the run of a source finishes.

An entry records what was tested (hashes of the source, of its mutants and of each test file), with which tests, and the
results. It is stale if the mutants of the source are no longer the same; comments may change.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.host import processor
from bench.mutation.mutate import Mutant, Report, Verdict, mutants
from bench.paths import RESULTS, ROOT
from cllm_gpu.simulator.errors import KINDS
from cllm_gpu.utils.compiler import compiler_version, require_compiler
from cllm_gpu.utils.files import write_atomically
from cllm_gpu.utils.versions import environment

RESULT = RESULTS / "mutation.json"
_FINDING = re.compile(rf"KernelError: .*?: ({'|'.join(KINDS)})\b")

Entry = dict[str, Any]


def load() -> dict[str, Any]:
    """The content of the result file; without entries if the file does not exist."""
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"files": {}}


def digest(parts: Iterable[str]) -> str:
    """SHA-256 of several texts, including their lengths."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode()
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def mutants_digest(file: str, text: str) -> str:
    """Hash of the keys of all mutants, in order of position: unchanged if only comments change."""
    return digest(json.dumps(mutant.key) for mutant in mutants(file, text))


def test_files(tests: Sequence[str]) -> list[str]:
    """The test files among pytest's arguments, and the helper files in their folders."""
    named = [name for name in tests if name.endswith(".py")]
    folders = {Path(name).parent for name in named} | {Path("tests")}
    helpers = [path.as_posix() for folder in folders for path in sorted((ROOT / folder).glob("*.py"))]
    relative = [Path(path).relative_to(ROOT).as_posix() for path in helpers]
    return [*named, *sorted(name for name in relative if not Path(name).name.startswith("test_"))]


def cause(how: str) -> str:
    """What caught a mutant: a kind of the simulator's errors, "wrong result", "timed out", "crashed" and the like."""
    if how in ("timed out", "crashed"):
        return how
    if found := _FINDING.search(how):
        return found[1]
    return "does not compile" if "cannot compile" in how else "wrong result"


def entry(file: str, text: str, tests: Sequence[str], report: Report, taken_over: int) -> Entry:
    """The entry of a complete run over one source. taken_over: number of verdicts from runs with fewer tests."""
    kinds = dict.fromkeys(sorted({v.mutant.kind for v in report.verdicts}))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(sum(verdict.seconds for verdict in report.verdicts)),
        "machine": machine(),
        "source_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "mutants_sha256": mutants_digest(file, text),
        "tests": " ".join(tests),
        "tests_sha256": {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in test_files(tests)},
        "share": round(report.share, 4),
        "untried": report.untried,
        "taken_over": taken_over,
        "kinds": {kind: _counts(v for v in report.verdicts if v.mutant.kind == kind) for kind in kinds},
        "ways": dict(Counter(cause(v.how) for v in report.verdicts if v.caught).most_common()),
        "survivors": [_place(v.mutant) for v in report.counted if not v.caught],
        "equivalent": [_place(v.mutant) | {"reason": v.how} for v in report.verdicts if v.equivalent],
    }


def _counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    group = list(verdicts)
    return {
        "tried": len(group),
        "caught": sum(v.caught for v in group),
        "equivalent": sum(v.equivalent for v in group),
    }


def _place(mutant: Mutant) -> dict[str, Any]:
    return {"line": mutant.line, "change": f"{mutant.before} -> {mutant.after}", "in": mutant.context}


def machine() -> dict[str, str]:
    """Versions, compiler and processor, for an entry."""
    return environment() | {"compiler": compiler_version(require_compiler()), "processor": processor()}


def merge(file: str, new: Entry, there: Iterable[str]) -> None:
    """Write `new` as the entry of `file`, and remove entries of sources that are not in `there`."""
    kept = {name: old for name, old in load()["files"].items() if name in set(there) and name != file}
    files = dict(sorted((kept | {file: new}).items()))
    write_atomically(RESULT, json.dumps({"total": total(files), "files": files}, indent=1, ensure_ascii=False) + "\n")


def total(files: Mapping[str, Entry]) -> dict[str, Any]:
    """Total counts, and the share that was caught, over `files`."""
    counts: Counter[str] = Counter()
    for found in files.values():
        for kind in found["kinds"].values():
            counts.update(kind)
    counted = counts["tried"] - counts["equivalent"]
    return {
        "tried": counts["tried"],
        "caught": counts["caught"],
        "equivalent": counts["equivalent"],
        "untried": sum(found["untried"] for found in files.values()),
        "share": round(counts["caught"] / max(counted, 1), 4),
        "seconds": sum(found["seconds"] for found in files.values()),
    }


def table() -> str:
    """The results as a Markdown table."""
    found = load()
    rows = {file: total({file: one}) for file, one in found["files"].items()}
    lines = ["| source | mutants | equivalent | tried | caught | share |", "|---|---:|---:|---:|---:|---:|"]
    for file, row in [*rows.items(), ("all", found["total"])]:
        name = f"`{file}`" if file != "all" else "all"
        tried = row["tried"] - row["equivalent"]
        counts = f"{row['tried'] + row['untried']} | {row['equivalent']} | {tried} | {row['caught']}"
        lines.append(f"| {name} | {counts} | {row['share']:.1%} |")
    ways: Counter[str] = Counter()
    for one in found["files"].values():
        ways.update(one["ways"])
    spoken = ", ".join(f"{name} {count}" for name, count in ways.most_common())
    hours = found["total"]["seconds"] / 3600
    return "\n".join([*lines, "", f"Caught by: {spoken}. Total time: {hours:.1f} hours."])
