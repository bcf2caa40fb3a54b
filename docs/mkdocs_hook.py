"""MkDocs hooks that turn pages written for a code host into a site.

- The README becomes the page `readme.md`.
- A link to another file of the repository (`../bench/results/x.png`) becomes a link to a copy in the site, below
  `repository/`. A link to a file that does not exist is not changed, and MkDocs reports it.
- Formulas (inline $…$, display $$…$$) become MathML, which browsers render without scripts.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
README = "readme.md"
COPIES = "repository"
CODE = r"^(?:```.*?^```|    .*?)$|`[^`\n]+`"
"""Matches code, in which nothing is a link or a formula."""
LINK = re.compile(rf"{CODE}|(?P<before>\]\()(?P<target>[^)\s#]+)", re.S | re.M)
FORMULA = re.compile(rf"{CODE}|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and every file of the repository that a page links to."""
    files.append(File.generated(config, README, abs_src_path=str(ROOT / "README.md")))
    linked = {place for page in files.documentation_pages() for place in _places(page)}
    for place in sorted(linked):
        if place.startswith(f"{COPIES}/"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / place.removeprefix(f"{COPIES}/"))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links and formulas of a page."""

    def rewritten(link: re.Match[str]) -> str:
        place = link["target"] and _place(page.file, link["target"])
        return f"{link['before']}{place}" if place else link[0]

    return FORMULA.sub(_mathml, LINK.sub(rewritten, markdown))


def _places(page: File) -> set[str]:
    """Targets in the site of a page's links to files of this repository."""
    links = LINK.finditer(page.content_string)
    return {place for link in links if link["target"] and (place := _place(page, link["target"]))}


def _place(page: File, target: str) -> str | None:
    """Path below the site's root of a link's target; None for a URL, or if the file does not exist.

    All pages are at the root of the site, so this is also the new link.
    """
    folder = "" if page.src_uri == README else "docs"
    path = posixpath.normpath(posixpath.join(folder, target))
    if ":" in target or not (ROOT / path).is_file():
        return None
    if path == "README.md":
        return README
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def _mathml(found: re.Match[str]) -> str:
    if found["block"]:
        return f"<p>{convert(found['block'], display='block')}</p>"
    # in a span: Markdown would treat a line that begins with <math> as a block
    return f"<span>{convert(found['inline'])}</span>" if found["inline"] else found[0]
