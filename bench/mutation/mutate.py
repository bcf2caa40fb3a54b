"""Mutation testing of kernels: changes the source in one place at a time and runs the tests on each mutant.

Mutations: remove a barrier, wait or commit; loosen a wait by one group; move the bound of a comparison by one (exchange
`<` and `<=`, `>` and `>=`); change a sign. A mutant is caught if the check raises, crashes or times out. Sources must
have spaces around binary operators, which distinguishes them from template brackets and pointers.
"""

from __future__ import annotations

import math
import os
import random
import re
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cllm_gpu.utils.errors import UserError

Key = tuple[str, str, str, str, int]
"""Identifies a mutant: see Mutant.key."""
Check = Callable[[Path], None]
"""Called with a folder with all sources, one of them mutated; raises if it catches the mutant."""

_HIDDEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#[^\n]*(?:\\\n[^\n]*)*', re.S | re.M)
_PATTERNS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    ("barrier removed", re.compile(r"__sync(?:threads|warp)\([^()]*\);"), lambda m: ";"),
    ("wait removed", re.compile(r"\bcopy_async_wait<[^<>;]*>\(\);"), lambda m: ";"),
    ("wait loosened", re.compile(r"\bcopy_async_wait<([^<>;]*)>"), lambda m: f"copy_async_wait<({m[1]}) + 1>"),
    ("commit removed", re.compile(r"\bcopy_async_commit\(\);"), lambda m: ";"),
    ("bound moved", re.compile(r"(?<= )[<>]=?(?= )"), lambda m: m[0][0] if len(m[0]) == 2 else m[0] + "="),
    ("sign changed", re.compile(r"(?<= )[+-](?=[ =])"), lambda m: "-" if m[0] == "+" else "+"),
)


@dataclass(frozen=True)
class Mutant:
    """A mutation at one position."""

    file: str
    line: int
    kind: str
    start: int
    """Offset of the replaced text in the file."""
    before: str
    after: str
    context: str
    """The original line."""
    following: str
    """The next nonempty line."""
    place: int
    """1 for the first mutation of this kind and text in its line, 2 for the next, …"""

    @property
    def key(self) -> Key:
        """Identifies the mutant independent of line numbers: file, line, next line, "before -> after", place."""
        return self.file, self.context, self.following, f"{self.before} -> {self.after}", self.place

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.before!r} -> {self.after!r} in: {self.context}"

    def apply(self, text: str) -> str:
        """The mutated text."""
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


@dataclass(frozen=True)
class Verdict:
    """The result of the check on a mutant."""

    mutant: Mutant
    caught: bool
    how: str
    """The first line of the check's error message; "timed out", "crashed", "survived", or why it is equivalent."""
    equivalent: bool = False
    seconds: float = 0.0
    """Wall-clock time."""


@dataclass
class Report:
    """The verdicts on all tried mutants."""

    verdicts: list[Verdict] = field(default_factory=list)
    untried: int = 0
    """Number of mutants not tried because of the limit or the time."""

    @property
    def counted(self) -> list[Verdict]:
        """Verdicts on mutants that are not equivalent to the original."""
        return [v for v in self.verdicts if not v.equivalent]

    @property
    def share(self) -> float:
        """The fraction of `counted` that was caught."""
        return sum(v.caught for v in self.counted) / max(len(self.counted), 1)

    def __str__(self) -> str:
        kinds = sorted({v.mutant.kind for v in self.verdicts})
        rows = [f"{'mutation':18}{'tried':>7}{'caught':>8}{'equivalent':>12}"]
        for kind in kinds:
            group = [v for v in self.verdicts if v.mutant.kind == kind]
            caught, equivalent = sum(v.caught for v in group), sum(v.equivalent for v in group)
            rows.append(f"{kind:18}{len(group):7}{caught:8}{equivalent:12}")
        rows.append(f"caught {self.share:.1%} of {len(self.counted)} not equivalent; {self.untried} not tried")
        survivors = [f"survived: {v.mutant}" for v in self.counted if not v.caught]
        return "\n".join([*rows, *survivors])


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a source, in order of position."""
    visible = _HIDDEN.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    lines = text.split("\n")
    found: list[Mutant] = []
    for kind, pattern, replace in _PATTERNS:
        for match in pattern.finditer(visible):
            if kind == "bound moved" and _changes_nothing(visible, match.start()):
                continue
            line = text.count("\n", 0, match.start()) + 1
            context = lines[line - 1].strip()
            place = 1 + sum((m.line, m.kind, m.before) == (line, kind, match[0]) for m in found)
            following = next((after.strip() for after in lines[line:] if after.strip()), "")
            found.append(Mutant(file, line, kind, match.start(), match[0], replace(match), context, following, place))
    return sorted(found, key=lambda m: (m.start, m.kind))


# a < b ? a : b, with optional int(…): a minimum or maximum, equivalent with either comparison
_EXTREME = re.compile(
    r"(?:[=(,] ?)(?P<a>[^=(,?;]+) (?P<sign>[<>]=?) (?P<b>[^?;]+?) "
    r"\? (?:int\((?P=a)\)|(?P=a)) : (?:int\((?P=b)\)|(?P=b))(?=[;,)])"
)


def _changes_nothing(text: str, position: int) -> bool:
    """Whether the comparison belongs to `template < …`, or to a minimum or maximum written as a conditional."""
    if text[:position].rstrip().endswith("template"):
        return True
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start : end if end >= 0 else len(text)]
    return any(start + m.start("sign") == position for m in _EXTREME.finditer(line))


def run(
    folder: Path,
    files: Sequence[str],
    check: Check,
    *,
    kinds: Sequence[str] = (),
    limit: int | None = None,
    seed: int = 0,
    seconds_each: float = 60.0,
    seconds: float | None = None,
    processes: int = 1,
    sound_first: bool = True,
    equivalent: Mapping[Key, str] | None = None,
    known: Iterable[Verdict] = (),
    progress: Callable[[Verdict], None] | None = None,
) -> Report:
    """Try mutants of `files` in `folder`; each is checked in a forked process on a copy of the folder.

    kinds: kinds of mutation to try; empty: all. limit: maximum number of mutants that are not equivalent, drawn with
    `seed` regardless of kind. seconds: no new mutants are started after this time. seconds_each: time limit of a check,
    at which the mutant counts as caught, as it does at a limit set by `limit_processor_time`. sound_first: check the
    original sources first; False if they are known to pass. equivalent: Mutant.key → reason why the mutation changes
    nothing. known: verdicts of an earlier, interrupted run. progress: called with each new verdict.

    Raises UserError if the platform has no fork, or if the check fails on the original sources.
    """
    if not hasattr(os, "fork"):
        raise UserError("mutation runs need os.fork, which Windows does not have")
    texts = {file: (folder / file).read_text(encoding="utf-8") for file in files}
    everything = [mutant for file, text in texts.items() for mutant in mutants(file, text)]
    everything = [mutant for mutant in everything if not kinds or mutant.kind in kinds]
    random.Random(seed).shuffle(everything)
    same, judged = equivalent or {}, {verdict.mutant: verdict for verdict in known}
    chosen = [mutant for mutant in everything if mutant.key not in same][:limit]
    deadline = None if seconds is None else time.monotonic() + seconds
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        runner = _Runner(folder, Path(scratch), check, seconds_each, processes)
        complaint = runner.judge_sound() if sound_first else ""
        if complaint:
            raise UserError(f"the check does not pass on the sources as they are: {complaint}")
        report.verdicts += [Verdict(m, False, same[m.key], True) for m in everything if m.key in same]
        report.verdicts += [judged[m] for m in chosen if m in judged]
        waiting = [m for m in chosen if m not in judged]
        for verdict in runner.judge_all(waiting, texts, deadline):
            report.verdicts.append(verdict)
            if progress is not None:
                progress(verdict)
    report.untried = len(everything) - len(report.verdicts)
    report.verdicts.sort(key=lambda v: (v.mutant.file, v.mutant.start, v.mutant.kind))
    return report


@dataclass
class _Child:
    process: int
    pipe: int
    begin: float
    seconds: float
    mutant: Mutant | None
    folder: Path

    @property
    def deadline(self) -> float:
        return self.begin + self.seconds


class _Runner:
    """Runs the check in forked processes, several at a time."""

    def __init__(self, folder: Path, scratch: Path, check: Check, seconds_each: float, processes: int) -> None:
        self._folder, self._scratch, self._check = folder, scratch, check
        self._seconds_each, self._processes = seconds_each, processes
        self._count = 0

    def judge_sound(self) -> str:
        """The check's error message on the original sources; empty if it passes."""
        child = self._start(None, "")
        verdict = self._wait([child])[1]
        return "" if verdict == "survived" else verdict

    def judge_all(self, waiting: list[Mutant], texts: Mapping[str, str], deadline: float | None) -> Iterable[Verdict]:
        """Yields verdicts in order of completion."""
        running: list[_Child] = []
        queue = list(reversed(waiting))
        while queue or running:
            late = deadline is not None and time.monotonic() > deadline
            while queue and not late and len(running) < self._processes:
                mutant = queue.pop()
                running.append(self._start(mutant, mutant.apply(texts[mutant.file])))
            if not running:
                return
            child, how = self._wait(running)
            running.remove(child)
            assert child.mutant is not None
            yield Verdict(child.mutant, how != "survived", how, seconds=time.monotonic() - child.begin)

    def _start(self, mutant: Mutant | None, text: str) -> _Child:
        self._count += 1
        folder = self._scratch / f"mutant{self._count}"
        shutil.copytree(self._folder, folder)
        if mutant is not None:
            (folder / mutant.file).write_text(text, encoding="utf-8")
        pipe, far_end = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(pipe)
            _child_main(self._check, folder, far_end)
        os.close(far_end)
        return _Child(process, pipe, time.monotonic(), self._seconds_each, mutant, folder)

    def _wait(self, running: list[_Child]) -> tuple[_Child, str]:
        """Wait for a child to exit, or kill the one that is out of time."""
        while True:
            first = min(running, key=lambda child: child.deadline)
            ready, _, _ = select.select([c.pipe for c in running], [], [], max(first.deadline - time.monotonic(), 0))
            child = next((c for c in running if c.pipe in ready), first)
            if not ready and time.monotonic() < first.deadline:
                continue
            said = _read_all(child.pipe) if ready else _stop(child)
            os.close(child.pipe)
            _, status = os.waitpid(child.process, 0)
            shutil.rmtree(child.folder, ignore_errors=True)
            return child, said or _end(status)


def _end(status: int) -> str:
    """The verdict on a child that exited without a message."""
    out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    return "survived" if status == 0 else "timed out" if out_of_time else "crashed"


def limit_processor_time(seconds: float) -> None:
    """For use in a check: limit the processor time of this process from now on; exceeding it counts as "timed out".

    Unlike wall-clock time, processor time hardly depends on other load. Rounded up to whole seconds. Replaces earlier
    limits.
    """
    import resource  # not there on Windows

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _child_main(check: Check, folder: Path, pipe: int) -> None:
    """Body of a forked process: writes the error message to the pipe and never returns."""
    status = 1
    try:
        os.setpgrp()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        check(folder)
        status = 0
    except BaseException as error:
        complaint = str(error).strip().split("\n")[0] or type(error).__name__
        os.write(pipe, complaint.encode()[:2000])
    finally:
        os._exit(status)


def _read_all(pipe: int) -> str:
    pieces = []
    while piece := os.read(pipe, 4096):
        pieces.append(piece)
    return b"".join(pieces).decode(errors="replace")


def _stop(child: _Child) -> str:
    try:
        os.killpg(child.process, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child.process, signal.SIGKILL)
    return "timed out"
