"""A self-contained HTML page of one or more runs: no network, scripts or fonts.

All text is escaped, and the page's content security policy forbids loading anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cllm_gpu.config import to_toml
from cllm_gpu.report.html_style import STYLE
from cllm_gpu.report.runs import RunRecord, differences_table, runs_table
from cllm_gpu.report.svg_chart import COLOURS, Chart, Line, escaped, svg
from cllm_gpu.report.table import Table
from cllm_gpu.utils.files import readable_size, write_atomically

LONG_TITLE = 80
"""Maximum length in characters of the run names in the title."""
SETTLING = 0.02
"""Fraction of the first steps, with their steep fall of the loss, that is ignored for the range of the loss axis."""


def write_page(runs: Sequence[RunRecord], path: Path) -> None:
    """Write the page of `runs`. Raises UserError if the file cannot be written."""
    write_atomically(path, page(runs))


def page(runs: Sequence[RunRecord]) -> str:
    """The page: a table of the runs, and every other section for which the runs have data."""
    names = ", ".join(run.name for run in runs)
    title = f"Run {names}" if len(runs) == 1 else f"Runs {names}" if len(names) <= LONG_TITLE else f"{len(runs)} runs"
    parts = [summary(runs), curves(runs), memory(runs), samples(runs), configurations(runs)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escaped(title)}</title>",
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escaped(title)}</h1>",
            *(part for part in parts if part),
            "</body></html>",
            "",
        ]
    )


# ---- sections; each is "" if the runs have no data for it


def summary(runs: Sequence[RunRecord]) -> str:
    """The progress, losses and speed of each run."""
    table = runs_table(runs)
    return section("Summary", html_table(table) + "".join(f"<p>{escaped(note)}</p>" for note in table.notes))


def curves(runs: Sequence[RunRecord]) -> str:
    """Losses, learning rate, gradient norm and speed over the steps."""
    validated = "; dashed: validation" if any(run.evaluations for run in runs) else ""
    losses = tuple(line for number, run in enumerate(runs) for line in _losses(run, number))
    charts = (
        Chart("Loss", f"nats/token; training, smoothed; faint: every step{validated}", losses, settling=SETTLING),
        Chart("Learning rate", "", _lines(runs, "rate")),
        Chart("Gradient norm before clipping", "logarithmic", _lines(runs, "gradient_norm"), log=True),
        Chart("Speed", "tokens/s", _lines(runs, "tokens_per_second")),
    )
    keys = "".join(f"<li>{_swatch(number)}{escaped(run.name)}</li>" for number, run in enumerate(runs))
    return section("Curves", f'<div class="charts">{"".join(figure(chart, keys) for chart in charts)}</div>')


def _losses(run: RunRecord, colour: int) -> Iterable[Line]:
    yield Line(f"{run.name}, training", *run.series("steps", "loss"), colour, faint=True)
    yield Line(f"{run.name}, training (smoothed)", *run.series("steps", "smoothed_loss"), colour)
    yield Line(f"{run.name}, validation", *run.series("evaluations", "loss"), colour, dotted=True)


def _lines(runs: Sequence[RunRecord], value: str) -> tuple[Line, ...]:
    return tuple(Line(run.name, *run.series("steps", value), colour) for colour, run in enumerate(runs))


def memory(runs: Sequence[RunRecord]) -> str:
    """The memory plan of each run."""
    planned = [run for run in runs if run.plan]
    if not planned:
        return ""
    names = list(dict.fromkeys(name for run in planned for name in run.plan))
    rows = [(name, *(_size(run.plan.get(name)) for run in planned)) for name in names]
    return section("Memory plan", html_table(Table("Memory plan", ("", *(run.name for run in planned)), tuple(rows))))


def _size(count: int | None) -> str:
    return "–" if count is None else readable_size(count)


def samples(runs: Sequence[RunRecord]) -> str:
    """The samples generated during each run; the last one of each is unfolded."""
    return section("Samples", "".join(_samples_of(run) for run in runs if run.samples))


def _samples_of(run: RunRecord) -> str:
    texts = []
    for number, sample in enumerate(run.samples, start=1):
        shown = " open" if number == len(run.samples) else ""
        text = f"<b>{escaped(sample['prompt'])}</b>{escaped(sample['text'])}"
        texts.append(f"<details{shown}><summary>step {sample['step']:,}</summary><pre>{text}</pre></details>")
    return f"<h3>{escaped(run.name)}</h3>{''.join(texts)}"


def configurations(runs: Sequence[RunRecord]) -> str:
    """The differences between the configurations, and each full configuration, folded."""
    known = [(run.name, run.config) for run in runs if run.config is not None]
    body = ""
    if len(known) > 1:
        table = differences_table(runs)
        body = html_table(table) if table.rows else "<p>The runs have the same configuration.</p>"
    for name, config in known:
        body += f"<details><summary>{escaped(name)}, in full</summary><pre>{escaped(to_toml(config))}</pre></details>"
    return section("Configuration", body)


# ---- HTML elements


def section(title: str, body: str) -> str:
    """A section with a heading; "" if the body is empty."""
    return f"<section><h2>{escaped(title)}</h2>{body}</section>" if body else ""


def html_table(table: Table) -> str:
    """A table that scrolls horizontally on a narrow page."""

    def row(cells: Iterable[str], tag: Callable[[int], str]) -> str:
        marked = ((tag(n), ' class="text"' if n in table.text_columns else "", c) for n, c in enumerate(cells))
        return "<tr>" + "".join(f"<{name}{kind}>{escaped(cell)}</{name}>" for name, kind, cell in marked) + "</tr>"

    head = row(table.header, lambda column: "th")
    body = "".join(row(cells, lambda column: "td" if column else "th") for cells in table.rows)
    box = f'<div class="scroll" role="region" aria-label="{escaped(table.title)}" tabindex="0">'
    return f"{box}<table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def figure(chart: Chart, keys: str) -> str:
    """A chart with its title and legend `keys`; "" if it has no points."""
    drawn = svg(chart)
    if not drawn:
        return ""
    unit = f" <small>{escaped(chart.unit)}</small>" if chart.unit else ""
    return f"<figure><figcaption>{escaped(chart.title)}{unit}<ul>{keys}</ul></figcaption>{drawn}</figure>"


def _swatch(colour: int) -> str:
    style = f"line c{colour % COLOURS}"
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path class="{style}" d="M0 4H24"/></svg>'
