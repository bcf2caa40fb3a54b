"""The report page: everything a run keeps is on it, as text, and nothing on it makes a browser load anything."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cllm_gpu.config import Config, OptimizerConfig, TrainingConfig
from cllm_gpu.report.html_page import page, write_page
from cllm_gpu.report.html_style import STYLE
from cllm_gpu.report.runs import RunRecord, read_run, read_runs
from cllm_gpu.report.svg_chart import COLOURS
from cllm_gpu.training.memory_plan import MemoryPlan
from cllm_gpu.training.metrics import MetricsLog
from cllm_gpu.training.run_folder import save_configuration, save_plan
from cllm_gpu.training.samples import keep_sample
from cllm_gpu.utils.errors import UserError

PLAN = MemoryPlan(1000, 2000, 3000, 4_500_000, 500_000, 250)


class Page(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and the text within each kind of element."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.append((self._open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag]


def record(name: str = "001", **other: Any) -> RunRecord:
    steps = tuple(
        {
            "kind": "step",
            "step": step,
            "loss": 5.0 / step,
            "smoothed_loss": 6.0 / step,
            "rate": 0.001 * step,
            "gradient_norm": 2.0 / step,
            "skipped": None,
            "tokens": 100 * step,
            "tokens_per_second": 1000.0 + step,
        }
        for step in range(1, 5)
    )
    evaluations = ({"kind": "evaluation", "step": 4, "loss": 1.75, "bits_per_byte": 2.5},)
    return RunRecord(name, steps, evaluations, **other)


def full(name: str, rate: float) -> RunRecord:
    samples = (
        {"kind": "sample", "step": 2, "prompt": "def ", "text": "early"},
        {"kind": "sample", "step": 4, "prompt": "def ", "text": "late"},
    )
    config = Config(optimizer=OptimizerConfig(rate=rate), training=TrainingConfig(seed=7))
    return record(name, samples=samples, plan=dict(PLAN.rows()), config=config)


def test_everything_of_two_runs_is_there():
    found = Page(page([full("001", 0.5), full("big", 0.25)]))
    assert found.of("h1") == ["Runs 001, big"]
    assert found.of("h2") == ["Summary", "Curves", "Memory plan", "Samples", "Configuration"]
    captions = ["Loss ", "Learning rate", "Gradient norm before clipping ", "Speed "]
    assert found.of("figcaption") == captions
    assert found.of("li") == ["001", "big"] * 4
    assert "dashed: validation" in found.of("small")[0]
    cells = found.of("td")
    for cell in ("4", "400", "1.5000", "1.7500", "2.5000", "1,003", "3.0 kB", "4.5 MB", "5.0 MB"):
        assert cells.count(cell) >= 2, cell
    assert found.of("summary") == ["step 2", "step 4"] * 2 + ["001, in full", "big, in full"]
    assert found.of("pre")[:4] == ["early", "late", "early", "late"]
    assert [f"rate = {rate}" in text for rate, text in zip((0.5, 0.25), found.of("pre")[4:], strict=True)] == [True] * 2
    opened = [attributes for tag, attributes in found.elements if tag == "details"]
    assert ["open" in attributes for attributes in opened] == [False, True] * 2 + [False] * 2


def test_only_what_differs_is_in_the_table_of_differences():
    first, second = full("a", 0.5), full("b", 0.25)
    elsewhere = dataclasses.replace(second.config, output="other/folder")
    found = Page(page([first, dataclasses.replace(second, config=elsewhere)]))
    assert found.of("th")[-4:] == ["setting", "a", "b", "optimizer.rate"]
    assert found.of("td")[-2:] == ["0.5", "0.25"]
    assert "The runs have the same configuration." in Page(page([first, first])).of("p")


def test_the_curves_are_the_runs():
    paths = [a["class"] for tag, a in Page(page([record(str(n)) for n in range(10)])).elements if tag == "path"]
    curves = [name.split() for name in paths if name.startswith("line")]
    for number in range(10):
        assert ["line", f"c{number % COLOURS}"] in curves
    assert sum("dotted" in names for names in curves) == 10
    assert {name for names in curves for name in names if name.startswith("c")} == {f"c{n}" for n in range(COLOURS)}
    assert Page(page([record("long name " * 5 + str(n)) for n in range(10)])).of("h1") == ["10 runs"]
    for number in range(COLOURS):
        assert f".c{number} {{ stroke: var(--c{number}) }}" in STYLE
        assert STYLE.count(f"--c{number}: #") == 2  # light and dark


def test_a_run_that_kept_only_steps():
    bare = dataclasses.replace(record(), evaluations=())
    found = Page(page([bare]))
    assert found.of("h1") == ["Run 001"]
    assert found.of("h2") == ["Summary", "Curves"]
    assert "validation" not in found.of("small")[0]


def test_a_chart_without_a_value_is_left_out():
    run = record()
    lost = tuple(step | {"loss": math.nan, "smoothed_loss": math.nan, "gradient_norm": math.inf} for step in run.steps)
    found = Page(page([dataclasses.replace(run, steps=lost, evaluations=())]))
    assert found.of("figcaption") == ["Learning rate", "Speed "]


HOSTILE = "<script src=http://x.test/a.js></script><img src=x onerror=alert(1)>&amp;\"'\x00\x1b\udc80"


def test_hostile_texts_stay_texts():
    config = Config(training=TrainingConfig(sample_prompt="</pre><script>1</script>"))
    sample = {"kind": "sample", "step": 1, "prompt": HOSTILE, "text": HOSTILE + "</pre></details>"}
    content = page([record(HOSTILE, samples=(sample,), plan={HOSTILE: 5}, config=config), record("other")])
    found = Page(content)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "base", "form", "a"}
    shown = HOSTILE.replace("\x00", "\\x00").replace("\x1b", "\\x1b").replace("\udc80", "\\udc80")
    assert Page(page([record(HOSTILE)])).of("h1") == [f"Run {shown}"]
    assert found.of("li") == [shown, "other"] * 4
    assert shown in found.of("b")
    assert shown + "</pre></details>" in found.of("pre")
    assert shown in found.of("th")
    content.encode()


def test_nothing_is_loaded():
    found = Page(page([full("001", 0.5), full("002", 0.25)]))
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "background", "poster", "style"}
    for tag, attributes in found.elements:
        assert not loading & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"url\(|@import|http", STYLE)
    policies = [a["content"] for tag, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_a_page_is_written_from_a_folder(tmp_path):
    for parent in ("a", "b"):
        folder = tmp_path / parent / "001"
        log = MetricsLog(folder / "metrics.jsonl")
        for step in record().steps:
            log.append(step)
        keep_sample(log, 4, "def ", "f(ä):")
        save_plan(folder, PLAN)
        save_configuration(folder, Config())
    run = read_run(tmp_path / "a" / "001")
    assert run.plan["total"] == PLAN.total
    assert run.samples == ({"kind": "sample", "step": 4, "prompt": "def ", "text": "f(ä):"},)
    assert run.config == Config()
    runs = read_runs([tmp_path / "a" / "001", tmp_path / "b" / "001"])
    assert [run.name for run in runs] == [str(tmp_path / "a" / "001"), str(tmp_path / "b" / "001")]
    write_page(runs, tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page(runs)


@pytest.mark.parametrize("damage", [b"[1]", b"{", b'{"total": "much"}', b"\xff"])
def test_a_damaged_plan_is_one_line(tmp_path, damage):
    MetricsLog(tmp_path / "metrics.jsonl").append(record().steps[0])
    (tmp_path / "plan.json").write_bytes(damage)
    with pytest.raises(UserError, match=r"plan\.json is not a memory plan; move it away"):
        read_run(tmp_path)


def test_an_unwritable_page_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        write_page([record()], tmp_path)
