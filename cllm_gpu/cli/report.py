"""cllm-gpu report"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cllm_gpu.cli.parsing import Command
from cllm_gpu.cli.progress import say
from cllm_gpu.report.diagnostics import diagnostics_tables, plot_diagnostics, read_diagnosed, series
from cllm_gpu.report.html_page import write_page
from cllm_gpu.report.runs import plot_runs, read_runs, run_summary, runs_table
from cllm_gpu.report.table import print_table, write_table
from cllm_gpu.training.run_folder import newest_run


@dataclass(frozen=True)
class ReportOptions:
    """Print a table of runs; write a page (--html) or plots (--picture)."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders (none: the newest run)."""
    html: Path | None = None
    """Write a self-contained page: curves, memory plans, samples, configuration differences."""
    picture: Path | None = None
    """Write the curves to this PNG file; needs the extra `plots`."""
    diagnostics: Path | None = None
    """Plot gradients, updates and activations by layer to this PNG file and print their tables, for runs trained with
    --training.diagnose-every; needs the extra `plots`."""
    output: Path | None = None
    """Write the table to this folder, as Markdown and JSON."""


COMMAND = Command(
    "report",
    ReportOptions,
    examples="""
    # the newest run in one row
    cllm-gpu report
    # two runs on one page: curves, samples, differences
    cllm-gpu report runs/001 runs/002 --html page.html
    # their table as Markdown and JSON
    cllm-gpu report runs/001 runs/002 --output tables
    # gradients and activations of a run trained with --training.diagnose-every 50
    cllm-gpu report --diagnostics layers.png
    """,
)


def main(arguments: list[str]) -> int:
    """Print and write the report. Returns exit status 0."""
    options = COMMAND.parse(arguments)
    folders = options.runs or (newest_run(),)
    runs = read_runs(folders)
    diagnosed = read_diagnosed(folders) if options.diagnostics else []
    table = runs_table(runs)
    print_table(table)
    for run in diagnosed:
        for part in diagnostics_tables(run):
            print_table(part)
    written: list[Path] = []
    if options.output:
        written += write_table(table, [run_summary(run) for run in runs], options.output, "report")
    if options.html:
        write_page(runs, options.html)
        written.append(options.html)
    if options.picture:
        plot_runs(runs, options.picture)
        written.append(options.picture)
    if options.diagnostics:
        plot_diagnostics([(run.run.name, series(run)) for run in diagnosed], options.diagnostics)
        written.append(options.diagnostics)
    if written:
        say("written: " + ", ".join(map(str, written)))
    return 0
