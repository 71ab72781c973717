"""No import runs upwards, and no imports go in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("attention", "parallel", "trainer", "launch")
"""The lowest first: each folder may import those before it."""

Graph = dict[str, set[str]]


def product_modules() -> dict[str, Path]:
    """Return the product's files by dotted name without ``longspan``: ``trainer.recipe.schema``."""
    files = [path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imported_names(path: Path) -> Iterator[str]:
    """Yield the absolute dotted names that a file imports, including those inside functions."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.removeprefix("longspan.")
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            if node.level:
                base = [*package[: len(package) - node.level + 1], *module]
            else:
                base = [".".join(module).removeprefix("longspan.")]
            for alias in node.names:
                yield ".".join([*base, alias.name])


def import_graph() -> Graph:
    """Return the files that each file imports.

    ``from .package import name`` imports the package's ``__init__``, unless ``name`` is a file.
    """
    modules = product_modules()

    def file_of(name: str) -> str | None:
        for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
            if candidate in modules:
                return candidate
        package = f"{name.rpartition('.')[0]}.__init__"
        return package if package in modules else None

    graph: Graph = {}
    for name, path in modules.items():
        imported_files = {file_of(imported) for imported in imported_names(path)}
        graph[name] = {file for file in imported_files if file and file != name}
    return graph


def circle(graph: Graph) -> list[str] | None:
    """Return a path of imports that leads back to its start, or None if there is none."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return None
        for imported in sorted(graph.get(name, ())):
            if circular_path := visit(imported, [*path, name]):
                return circular_path
        finished.add(name)
        return None

    for name in sorted(graph):
        if circular_path := visit(name, []):
            return circular_path
    return None


def by_package(graph: Graph, floor: str) -> Graph:
    """Return the import graph of a floor's folders; a file beside them counts as a folder."""

    def package(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2])

    packages: Graph = {}
    for name, imported in graph.items():
        if name.startswith(f"{floor}."):
            inside = {package(other) for other in imported if other.startswith(f"{floor}.")}
            packages.setdefault(package(name), set()).update(inside - {package(name)})
    return packages


def test_no_import_runs_upwards():
    for name, imported in import_graph().items():
        height = FLOORS.index(name.split(".")[0])
        above = [other for other in imported if FLOORS.index(other.split(".")[0]) > height]
        assert not above, f"{name} imports {above}"


def test_no_files_import_each_other_in_a_circle():
    circular_path = circle(import_graph())
    assert circular_path is None, " -> ".join(circular_path or [])


def test_no_folders_of_the_trainer_import_each_other_in_a_circle():
    circular_path = circle(by_package(import_graph(), "trainer"))
    assert circular_path is None, " -> ".join(circular_path or [])


def test_megatron_core_comes_through_one_module():
    importing = {
        name
        for name, path in product_modules().items()
        if any(imported.split(".")[0] == "megatron" for imported in imported_names(path))
    }
    assert importing == {"trainer.megatron_core"}


@pytest.mark.parametrize(
    ("graph", "circular_path"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, None),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_circle_finds_a_circular_import(graph, circular_path):
    assert circle(graph) == circular_path


def test_imports_inside_functions_count():
    graph = import_graph()
    assert "trainer.layers.softmax_mixer" in graph["trainer.layers.softmax"]
    assert "parallel.softmax" in graph["parallel.__init__"]
