"""Asks a kernel's tests how much they would notice: damages the source in one place at a time and runs them again.

Mutations: each barrier, wait and commit removed; each wait loosened by one group; each comparison's bound moved by one
(`<` and `<=`, `>` and `>=` exchanged); each sign changed. A mutant is caught when the check raises, crashes or runs out
of time. Sources must be written with spaces around binary operators, which is also how operators are told from
template brackets and pointers.
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
"""What names a mutant: see Mutant.key."""
Check = Callable[[Path], None]
"""Takes a folder with all sources, one of them damaged; raises when it notices."""

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
    """One damaged place."""

    file: str
    line: int
    kind: str
    start: int
    """Offset of the replaced text in the file."""
    before: str
    after: str
    context: str
    """The line as it stood."""
    following: str
    """The next line that is not empty."""
    place: int
    """1 for the first mutation of this kind and text in its line, 2 for the next, …"""

    @property
    def key(self) -> Key:
        """What names the mutant wherever its line moves to: file, line, line after, "before -> after", place."""
        return self.file, self.context, self.following, f"{self.before} -> {self.after}", self.place

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.kind}: {self.before!r} -> {self.after!r} in: {self.context}"

    def apply(self, text: str) -> str:
        """The damaged text."""
        return text[: self.start] + self.after + text[self.start + len(self.before) :]


@dataclass(frozen=True)
class Verdict:
    """What the check made of a mutant."""

    mutant: Mutant
    caught: bool
    how: str
    """The first line of the check's complaint; "timed out", "crashed", "survived", or why it is equivalent."""
    equivalent: bool = False
    seconds: float = 0.0
    """By the clock."""


@dataclass
class Report:
    """The verdicts on all mutants that were tried."""

    verdicts: list[Verdict] = field(default_factory=list)
    untried: int = 0
    """Mutants left out by the limit or for want of time."""

    @property
    def counted(self) -> list[Verdict]:
        """Verdicts on mutants that change what the kernel does."""
        return [v for v in self.verdicts if not v.equivalent]

    @property
    def share(self) -> float:
        """Part of them that was caught."""
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
    """Every mutation of a source, in order of place."""
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


# a < b ? a : b, either side perhaps in int(…): a minimum or maximum, the same with either comparison
_EXTREME = re.compile(
    r"(?:[=(,] ?)(?P<a>[^=(,?;]+) (?P<sign>[<>]=?) (?P<b>[^?;]+?) "
    r"\? (?:int\((?P=a)\)|(?P=a)) : (?:int\((?P=b)\)|(?P=b))(?=[;,)])"
)


def _changes_nothing(text: str, position: int) -> bool:
    """The comparison belongs to `template < …`, or to a minimum or maximum written out."""
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
    """Try mutants of `files` in `folder`; each runs in a forked process on a copy of the folder.

    kinds: the kinds of mutation to try; all where none is named. limit: at most so many that are not equivalent, drawn
    with `seed` (all kinds alike); seconds: stop starting new ones after this time.
    seconds_each: a check that takes longer is stopped and the mutant counts as caught; so is one that passes a limit it
    sets itself by `limit_processor_time`.
    sound_first: False if the check is known to pass on the sources as they are, which is tried first otherwise.
    equivalent: Mutant.key to the reason why that mutation changes nothing. known: what an earlier, interrupted run
    found. progress: called with each new verdict.
    Raises UserError where there is no fork, or when the check complains about the sources as they are.
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
    """Runs the check in forked processes, a few at a time."""

    def __init__(self, folder: Path, scratch: Path, check: Check, seconds_each: float, processes: int) -> None:
        self._folder, self._scratch, self._check = folder, scratch, check
        self._seconds_each, self._processes = seconds_each, processes
        self._count = 0

    def judge_sound(self) -> str:
        """The check's complaint about the sources as they are; empty when it passes."""
        child = self._start(None, "")
        verdict = self._wait([child])[1]
        return "" if verdict == "survived" else verdict

    def judge_all(self, waiting: list[Mutant], texts: Mapping[str, str], deadline: float | None) -> Iterable[Verdict]:
        """Verdicts in the order in which they come in."""
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
        """Wait for one of the children to end, or end the one that is out of time."""
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
    """How a child ended that said nothing."""
    out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    return "survived" if status == 0 else "timed out" if out_of_time else "crashed"


def limit_processor_time(seconds: float) -> None:
    """For a check: this process may compute for so long from now on, or "timed out" is the verdict.

    A busy machine hardly stretches the processor's time. Whole seconds count, rounded up. A later call replaces it.
    """
    import resource  # not there on Windows

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _child_main(check: Check, folder: Path, pipe: int) -> None:
    """Body of a forked process: the complaint goes into the pipe; never returns."""
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
