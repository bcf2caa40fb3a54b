"""Imports run one way: down the map of the package in the README, in no circle, and CuPy is imported where it is said.

Imports in functions and under TYPE_CHECKING count too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.import_graph import PACKAGE, Graph, Imports, cycle, depth, imported_names, package_of, read_imports

ROOT = Path(__file__).parents[1]
START = "__main__"
"""Starts the command line; above all others."""
OPERATIONS = ("registry", "cuda", "native", "stream", "reference", "precision", "specification")
"""The order within cllm_gpu/ops; cuda and native are two sides that import nothing of each other."""
ANNOTATIONS = {
    ("cllm_gpu.model.layers.layer", "cllm_gpu.model.activations"),
}
"""Pairs that import each other, one of them for an annotation alone (TYPE_CHECKING)."""
LIBRARIES = {"cupy": {"backend"}, "cupyx": {"ops.cuda.stream"}, "nvmath": {"ops.cuda.cublaslt"}}
"""Library of the GPU → the modules that import it."""
MOST_PACKAGES, MOST_IMPORTS, MOST_DEEP = 19, 80, 11


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(ROOT)


def order() -> list[str]:
    """Subpackages and single modules as the README lists them, the uppermost first."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = text.partition(f"```\n{PACKAGE}/\n")[2].partition("```")[0]
    return [START, *re.findall(r"^  ([a-z_]+)(?:/|\.py) ", listed, re.M)]


def upward(graph: Graph, order: list[str]) -> list[str]:
    """What imports something above itself."""
    return [
        f"{importer} imports {name}"
        for importer, imported in graph.items()
        for name in sorted(imported)
        if order.index(name) < order.index(importer)
    ]


def test_the_readme_lists_every_package(imports: Imports) -> None:
    assert sorted(order()) == sorted(imports.packages)


def test_imports_run_down_the_readmes_list(imports: Imports) -> None:
    print(imports.summary())
    assert upward(imports.packages, order()) == []
    assert len(imports.packages) <= MOST_PACKAGES
    assert sum(map(len, imports.packages.values())) <= MOST_IMPORTS
    assert depth(imports.packages) <= MOST_DEEP


def test_imports_within_the_operations_run_one_way(imports: Imports) -> None:
    graph: Graph = {name: set() for name in OPERATIONS}
    for module, imported in imports.modules.items():
        if package_of(module) == "ops" and module != f"{PACKAGE}.ops":
            part = module.split(".")[2]
            graph[part] |= {name.split(".")[2] for name in imported if package_of(name) == "ops"} - {part}
    assert upward(graph, list(OPERATIONS)) == []
    assert "native" not in graph["cuda"]


def test_no_modules_import_each_other_in_a_circle(imports: Imports) -> None:
    graph = {
        module: {name for name in imported if (module, name) not in ANNOTATIONS}
        for module, imported in imports.modules.items()
    }
    assert cycle(graph) == []


def test_utils_import_nothing_of_the_project(imports: Imports) -> None:
    assert imports.packages["utils"] == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_of_the_gpu_is_imported_where_it_is_said(library: str) -> None:
    found = set()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        names = imported_names(ast.parse(path.read_text(encoding="utf-8")))
        if any(name.partition(".")[0] == library for name in names):
            found.add(".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts))
    assert found == LIBRARIES[library]


# ---- the measure itself


def test_a_circle_and_an_upward_import_are_found() -> None:
    graph: Graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"b"}, "e": set()}
    assert set(cycle(graph)) == {"b", "c", "d"}
    assert cycle({"a": {"b"}, "b": set()}) == []
    assert depth(graph) == 1  # b, c and d are as one
    assert depth({"a": {"b"}, "b": {"c"}, "c": set()}) == 2
    assert upward(graph, ["a", "b", "c", "d", "e"]) == ["d imports b"]


def test_every_form_of_import_is_read(tmp_path: Path) -> None:
    files = {
        "__init__": "",
        "a/__init__": "",
        "a/one": "import cllm_gpu.b.two\nfrom cllm_gpu.b import two, name\nfrom cllm_gpu import __version__, c",
        "b/__init__": "name = 1",
        "b/two": "def f():\n    from cllm_gpu.c import g\n    importlib.import_module('cllm_gpu.a.one')",
        "c": "import cllm",
    }
    for name, text in files.items():
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    imports = read_imports(tmp_path)
    assert imports.modules["cllm_gpu.a.one"] == {"cllm_gpu.b.two", "cllm_gpu.b", "cllm_gpu.c"}
    assert imports.packages == {"a": {"b", "c"}, "b": {"a", "c"}, "c": set()}
    assert imports.single == ["cllm_gpu.c"]
