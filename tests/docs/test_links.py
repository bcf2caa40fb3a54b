"""Links: of the README and docs/ as a code host follows them, and of the site that `make docs` builds from them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```$|^    .*?$|`[^`\n]+`", re.S | re.M)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def links(text: str) -> list[str]:
    return LINK.findall(CODE.sub("", text))


def anchors(text: str) -> set[str]:
    """What a code host calls the headings: small letters, no punctuation, hyphens for blanks, a number if repeated."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
        if found[name]:
            found[f"{name}-{found[name]}"] = 0
    return set(found)


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere; addresses elsewhere are not followed."""
    bad = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        known = target.exists() and target.is_relative_to(ROOT)
        if not known or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/training.md) [b](docs/nowhere.md) [c](docs/training.md#the-text) [d](docs/training.md#not)\n"
    text += "[e](#two-commands) [f](../outside.md) `[g](code.md)` [h](https://example.org/x#y)\n"
    assert broken(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/training.md#not", "../outside.md"]


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    listed = {link for link in links(index.read_text(encoding="utf-8")) if link.endswith(".md")}
    assert {page.name for page in PAGES} - {"README.md", "index.md"} <= listed


# ---- the site


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    if not (find_spec("mkdocs") and find_spec("latex2mathml")):
        if os.environ.get("CLLM_REQUIRE_DOCS") == "1":
            pytest.fail("CLLM_REQUIRE_DOCS=1, and MkDocs is not installed")
        pytest.skip("not run: MkDocs is not installed (the extra docs)")
    return subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the site is made from."""
    for name in ("docs", "bench/results", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "mkdocs.yml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_the_site_is_built_with_its_pictures_and_formulas(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    site = checkout / "build" / "docs"
    for page in (checkout / "docs").glob("*.md"):
        assert (site / page.with_suffix(".html").name).is_file()
    for picture in re.findall(r'<img [^>]*src="([^"]+)"', (site / "crystalline.html").read_text(encoding="utf-8")):
        assert (site / picture).is_file()
    formulas = (site / "gradients.html").read_text(encoding="utf-8")
    assert formulas.count("<math") > 50
    assert not re.search('^<math[^>]*"inline"', formulas, re.M)  # one at a line's start would be a block of its own
    assert "$$" not in formulas
    assert "\\frac" not in formulas
    assert 'href="training.html"' in (site / "readme.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', (site / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "link",
    ["nowhere.md", "training.md#not-there", "../cllm_gpu/nowhere.py", "/absolute.md", "../README.md#not-there"],
)
def test_the_site_is_not_built_with_a_broken_link(checkout: Path, link: str) -> None:
    page = checkout / "docs" / "profiling.md"
    page.write_text(page.read_text(encoding="utf-8") + f"\n[a link]({link})\n", encoding="utf-8")
    done = build(checkout)
    assert done.returncode != 0
    assert link.partition("#")[0].rpartition("/")[2].lower() in done.stderr.lower()
