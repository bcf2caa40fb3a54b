"""Which module of the package imports which, read from the sources.

`python tests/import_graph.py FOLDER …` prints how much of it there is in the checkouts at these folders.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "cllm_gpu"
Graph = dict[str, set[str]]
"""Importer → what it imports."""


@dataclass(frozen=True)
class Imports:
    """The imports of a checkout.

    Those in functions and under TYPE_CHECKING count like any other. The package's own `__init__`, which is loaded with
    every module and imports nothing, is left out.
    """

    modules: Graph

    @property
    def packages(self) -> Graph:
        """The same between subpackages and single modules."""
        graph: Graph = {package_of(module): set() for module in self.modules}
        for module, imported in self.modules.items():
            graph[package_of(module)] |= {package_of(name) for name in imported} - {package_of(module)}
        return graph

    @property
    def single(self) -> list[str]:
        """Modules that are in no subpackage."""
        inside = {module.rpartition(".")[0] for module in self.modules}
        return [module for module in self.modules if module.count(".") == 1 and module not in inside]

    def summary(self) -> str:
        """Numbers and depths, in one line."""
        return "; ".join(
            f"{len(graph)} {kind}, {sum(map(len, graph.values()))} imports between them, at most {depth(graph)} deep"
            for kind, graph in (
                (f"packages and single modules ({len(self.single)} of these)", self.packages),
                ("modules", self.modules),
            )
        )


def package_of(module: str) -> str:
    """The subpackage of a module, or a single module's own name: cllm_gpu.ops.cuda.gelu → ops."""
    return module.split(".")[1]


def read_imports(root: Path) -> Imports:
    """The imports of the package in the checkout at `root`."""
    files = {_module_name(path.relative_to(root)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items() if module != PACKAGE}
    return Imports({module: set(_imported(tree, files.keys())) - {PACKAGE, module} for module, tree in trees.items()})


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.Module, modules: Iterable[str]) -> Iterator[str]:
    """The modules of the project that a module imports."""
    for name in imported_names(tree):
        parent = name.rpartition(".")[0]
        if name in modules:
            yield name
        elif parent in modules:  # a function or a class
            yield parent


def imported_names(tree: ast.Module) -> Iterator[str]:
    """The dotted name of everything that is imported, by a statement or by importlib.import_module("…")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def cycle(graph: Graph) -> list[str]:
    """The nodes of a cycle, in order; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def depth(graph: Graph) -> int:
    """Imports on the longest path; nodes that import each other in a circle count as one."""
    reached = {node: _reached(graph, node) for node in graph}
    knots = {node: min({node, *(other for other in reached[node] if node in reached[other])}) for node in graph}
    merged: Graph = {}
    for node, imported in graph.items():
        merged.setdefault(knots[node], set()).update({knots[name] for name in imported} - {knots[node]})
    depths: dict[str, int] = {}
    for knot in graphlib.TopologicalSorter(merged).static_order():
        depths[knot] = max((1 + depths[name] for name in merged[knot]), default=0)
    return max(depths.values())


def _reached(graph: Graph, start: str) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(f"{folder}: {read_imports(Path(folder)).summary()}")
