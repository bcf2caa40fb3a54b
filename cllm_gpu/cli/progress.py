"""Console output of the commands: messages and progress; for training also configuration, memory plan and summary.

On a terminal, progress is a live line; elsewhere (a file, a pipe, CI) occasional plain lines; with --quiet nothing. All
output goes through the console that `terminal` returns.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from cllm_gpu.config import Config, to_toml
from cllm_gpu.data import Dataset
from cllm_gpu.model.architecture import Architecture
from cllm_gpu.training.memory_plan import MemoryPlan
from cllm_gpu.training.reporter import Outcome
from cllm_gpu.utils.files import readable_size
from cllm_gpu.utils.text import visible

WIDE, NARROW = 120, 80
"""Terminal widths: the full live line from WIDE columns on, the shortest one below NARROW."""
WITH_MFU, WITH_POWER = 130, 140
"""Terminal widths from which the live line also shows these."""
LOSSY_BITS = "bits/byte (lossy tokenizer)"
"""Label of bits per byte of a text that its tokens do not reproduce."""
PLAIN_LINES = 40
"""Progress lines that a training run prints if there is no terminal."""
PLAIN_SECONDS = 10.0
"""Seconds between two progress lines over a text if there is no terminal."""


class _Spared:
    """A stream that work goes on without: after the first error everything written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lost = stream, False

    def write(self, text: str) -> int:
        """Write to the stream, if it is there."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it is there."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._lost:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # a pipe without a reader, a full disk, a lost terminal; a closed file
            self._lost = True
            with contextlib.suppress(OSError, ValueError):
                _to_nowhere(self._stream.fileno())
            reason = getattr(error, "strerror", None) or str(error)
            notice = f"cllm-gpu: the display is gone ({reason}); the work goes on without it\n"
            with contextlib.suppress(OSError):
                os.write(2, notice.encode())


def _to_nowhere(descriptor: int) -> None:
    """What a stream still holds back for `descriptor`, and all that follows, goes to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
    finally:
        os.close(null)


def terminal(*, quiet: bool = False, errors: bool = False) -> Console:
    """Where progress and messages go: standard output, or with `errors` standard error; quiet: nowhere.

    Once it cannot be written any more, as a pipe without a reader, it is silent, and the work goes on.
    """
    stream = sys.stderr if errors else sys.stdout
    spared: Any = None if stream is None else _Spared(stream)
    return Console(file=spared, highlight=False, soft_wrap=True, emoji=False, quiet=quiet)


class _ResultConsole(Console):
    """Standard output for the result of a command, which without a reader has nothing left to do."""

    def on_broken_pipe(self) -> None:
        """BrokenPipeError, for the command line to answer."""
        raise BrokenPipeError


def result_console() -> Console:
    """Where results go: standard output. OSError when it cannot be written."""
    return _ResultConsole(highlight=False, soft_wrap=True, emoji=False)


def say(text: str, console: Console | None = None, *, style: str = "", unbroken: bool = False) -> None:
    """One line, which a terminal breaks between words; unbroken: nowhere, as for a command that will be copied.

    `console`: see `terminal`; None: `result_console`.
    """
    console = console or result_console()
    console.print(visible(text), style=style, markup=False, soft_wrap=unbroken or not console.is_terminal)


@contextlib.contextmanager
def count_progress(console: Console, doing: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields `progress(done, doing)`, which updates a live line with a counter. Shows nothing without a terminal."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda done, doing: bar.update(task, completed=done, description=doing)


@contextlib.contextmanager
def byte_progress(console: Console, doing: str, then: str = "") -> Iterator[Callable[[int, int], None]]:
    """Yields `progress(done, total)`, in bytes: a live bar, or a plain line every PLAIN_SECONDS and at the end.

    then: name of the phase of unknown length that follows the reading.
    """
    bars = (BarColumn(bar_width=20),) if console.width >= NARROW else ()
    columns = (TextColumn("{task.description}"), *bars, TextColumn("{task.fields[amount]}"), TimeElapsedColumn())
    live = console.is_terminal
    with Progress(*columns, console=console, disable=not live, transient=True) as bar:
        task = bar.add_task(doing, total=None, amount="")
        told = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal told
            amount = f"{readable_size(done)} of {readable_size(total)}"
            finished = done >= total
            if finished and then:
                bar.update(task, visible=False)
                bar.add_task(then, total=None, amount="")
            else:
                bar.update(task, completed=done, total=max(1, total), amount=amount)
            if not live and (finished or time.monotonic() - told >= PLAIN_SECONDS):
                told = time.monotonic()
                say(f"{doing}: {amount}{f', {then} …' if finished and then else ''}", console)

        yield progress


def lossy_line(lost: float) -> str:
    """The message about a tokenizer whose tokens do not reproduce a fraction `lost` of the text's characters."""
    share = f"{lost:.2%}" if lost >= 1e-4 else f"{lost:.0e}"
    return f"lossy tokenizer: {share} of the characters of the text do not come back; bits per byte are of what is left"


def recompute_line(plan: MemoryPlan) -> str:
    """The recompute level of a run, and the size of the activations at each level."""
    levels = ", ".join(f"{level} {readable_size(size)}" for level, size in plan.activations_at)
    return f"recompute {plan.recompute}; activations by level: {levels}"


class ConsoleReporter:
    """A `reporter.Reporter` that prints to a console."""

    def __init__(self, console: Console, steps: int, memory_held: Callable[[], int | None]) -> None:
        """console: as returned by `terminal`; memory_held: as `Backend.memory_held`."""
        self.console = console
        self._steps = steps
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._memory_held = memory_held
        self._bits = "bits/byte"
        self._before: int | None = None
        self._most = 0
        self._speeds: list[tuple[float, float]] = []  # (tokens/s, MFU) of each step with an MFU
        self._power: list[tuple[float, float]] = []  # (W, J/token) of each step, if the device counts energy
        self._started = 0.0
        self._first = 0

    # ---- before training

    def opening(self, config: Config, architecture: Architecture, dataset: Dataset, plan: MemoryPlan) -> None:
        """Print the full configuration, the model's shape, the data and the memory plan."""
        self.console.print(to_toml(config).strip(), style="dim", markup=False)
        a = architecture
        self.message(
            f"\nmodel: {plan.parameter_count:,} parameters: {a.layers} layers, width {a.width}, {a.heads} heads of "
            f"{a.head_size}, context {a.context}, vocabulary {a.vocabulary}, positions {a.positions}, "
            f"attention {'standard' if a.lattice is None else f'crystalline ({a.lattice.spoken})'}"
        )
        skipped = f", {dataset.skipped_files} files skipped (not UTF-8 text)" if dataset.skipped_files else ""
        self.message(
            f"data: {len(dataset.train):,} training and {len(dataset.validation):,} validation tokens{skipped}"
        )
        for line in (*dataset.notes, *(dataset.tokenizer.notes if dataset.tokenizer else ())):
            self.message(line)
        if dataset.lost:
            self.message(lossy_line(dataset.lost))
            self._bits = LOSSY_BITS
        table = Table(title="memory plan", title_justify="left", show_header=False, box=None)
        for name, size in plan.rows():
            table.add_row(name, readable_size(size), style="bold" if name == "total" else "")
        self.console.print(table)
        self.message(recompute_line(plan))
        self._plan = plan
        self._before = self._memory_held()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[Callable[[int, int], None]]:
        """Yields `progress(done, total)`, in bytes, which updates a progress bar."""
        columns = (TextColumn("preparing data"), BarColumn(), TextColumn("{task.percentage:3.0f}%"))
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=None, visible=False)
            yield lambda done, total: bar.update(task, completed=done, total=max(1, total), visible=True)

    # ---- while training (reporter.Reporter)

    @contextlib.contextmanager
    def running(self, first_step: int) -> Iterator[None]:
        """Show the live line within the block; training continues from `first_step`."""
        self._started, self._first = time.perf_counter(), first_step
        if not self.console.is_terminal:
            yield
            return
        columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
        if self.console.width >= WIDE:
            columns = (BarColumn(bar_width=20), *columns)
        with Progress(*columns, console=self.console) as self._progress:
            self._task = self._progress.add_task(f"{first_step}/{self._steps}", total=self._steps, completed=first_step)
            yield
        self._progress = None

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's figures."""
        self._note_memory()
        card = self._card_figures(record)
        step, loss, smoothed, rate, norm, speed = (
            record[name] for name in ("step", "loss", "smoothed_loss", "rate", "gradient_norm", "tokens_per_second")
        )
        text = (
            f"step {step}/{self._steps}  loss {loss:.4f}  smoothed {smoothed:.4f}  rate {rate:.2e}  "
            f"gradient {norm:.2f}  {speed:,.0f} tokens/s{card}"
        )
        if self._progress is not None:
            if self.console.width < NARROW:  # fits 40 columns with the remaining time
                text = f"{step}/{self._steps} loss {smoothed:.3f}"
            elif self.console.width < WIDE:  # fits 80 columns
                text = (
                    f"{step}/{self._steps} loss {loss:.3f} ~{smoothed:.3f} lr {rate:.1e} |g| {norm:.2f} {speed:,.0f}/s"
                )
            self._progress.update(self._task, completed=record["step"], description=text)
        elif record["step"] % max(1, self._steps // PLAIN_LINES) == 0 or record["step"] in (1, self._steps):
            self.message(f"{text}  {self._remaining(record['step'])} left")

    def _card_figures(self, record: dict[str, Any]) -> str:
        """MFU and power, if the record has them and the line has room; also collected for the final summary."""
        text, width = "", self.console.width
        if "mfu" in record:
            self._speeds.append((record["tokens_per_second"], record["mfu"]))
            text += f"  MFU {record['mfu']:.0%}" if self._progress is None or width >= WITH_MFU else ""
        if "watts" in record:
            self._power.append((record["watts"], record["joules_per_token"]))
            text += f"  {record['watts']:.0f} W" if self._progress is None or width >= WITH_POWER else ""
        return text

    def _note_memory(self) -> None:
        self._most = max(self._most, self._memory_held() or 0)

    def _remaining(self, step: int) -> str:
        per_step = (time.perf_counter() - self._started) / max(1, step - self._first)
        seconds = round(per_step * (self._steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def evaluation(self, record: dict[str, Any]) -> None:
        """Show an evaluation."""
        self._note_memory()
        bits = record["bits_per_byte"]
        per_byte = f"  {bits:.4f} {self._bits}" if bits is not None else ""
        say(
            f"evaluation at step {record['step']}: loss {record['loss']:.4f}  perplexity {record['perplexity']:.3f}"
            f"{per_byte}  accuracy {record['accuracy']:.1%}",
            self.console,
            style="bold",
        )

    def message(self, text: str) -> None:
        """Print one line immediately."""
        say(text, self.console)

    # ---- after training

    def outcome(self, outcome: Outcome, folder: Path) -> None:
        """Print a summary: run folder, time, speed, power, and measured memory compared with the plan."""
        seconds = time.perf_counter() - self._started
        self.message(f"{outcome.step - self._first} steps in {seconds:.1f} s; run folder {folder}")
        if self._speeds:
            speed, utilisation = sorted(self._speeds)[len(self._speeds) // 2]
            self.message(f"speed: {speed:,.0f} tokens/s, MFU {utilisation:.1%} (median of the steps)")
        if self._power:
            watts, joules = (statistics.median(figures) for figures in zip(*self._power, strict=True))
            self.message(f"power: {watts:.0f} W, {joules:.3g} J/token (median of the steps)")
        if outcome.skipped:
            self.message(f"{outcome.skipped} steps were skipped")
        if self._before is not None and self._most > self._before:
            measured = readable_size(self._most - self._before)
            self.message(f"memory: planned {readable_size(self._plan.total)}, measured {measured}")

    def sample(self, prompt: str, pieces: Iterable[str]) -> str:
        """Print generated text as it arrives. Returns all of it."""
        taken = []
        self.console.print("\nsample:", style="bold")
        self.console.print(visible(prompt), end="", markup=False)
        for piece in pieces:
            taken.append(piece)
            self.console.print(visible(piece), end="", markup=False)
        self.console.print()
        return "".join(taken)
