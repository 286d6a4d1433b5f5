"""The walk of a request is as docs/development.md says; no files import each other in circles."""

import ast
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from tests.import_graph import ROOT, find_circle, import_graph, imported, module_files

MOST_ROOMS = 8
PAGE = (ROOT / "docs" / "development.md").read_text()
BENEATH = "kernels"


@dataclass(frozen=True)
class Station:
    """A function of the walk; `by_vllm`: vLLM calls it."""

    path: Path
    function: str
    by_vllm: bool

    @property
    def room(self) -> str:
        return self.path.relative_to(ROOT / "vllm_sparsed").parts[0]


def walk() -> list[Station]:
    """The rows `| room | file | functions | ... |` of the page; an asterisk: vLLM calls it."""
    section = PAGE.partition("## The walk of a request\n")[2].partition("\n## ")[0]
    return [
        Station(ROOT / "vllm_sparsed" / path, function, bool(mark))
        for path, functions in re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|([^|]*)\|", section, re.M)
        for function, mark in re.findall(r"`([\w.]+)`(\\\*)?", functions)
    ]


def definition(station: Station) -> ast.AST | None:
    """The function's or method's node in its file."""
    node: ast.AST = ast.parse(station.path.read_text())
    for name in station.function.split("."):
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and child.name == name
        ]
        if not found:
            return None
        node = found[0]
    return node


def called_names(path: Path) -> set[str]:
    """Last names of all that a file calls: `pack` of `self.packer.pack(...)`."""
    nodes = ast.walk(ast.parse(path.read_text()))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    methods = {func.attr for func in calls if isinstance(func, ast.Attribute)}
    return methods | {func.id for func in calls if isinstance(func, ast.Name)}


def test_walk_enters_each_room_once() -> None:
    rooms = [room for room, _ in groupby(station.room for station in walk())]
    assert rooms[0] == "frontend" and rooms[-1] == "decoding"
    assert len(rooms) == len(set(rooms)), rooms
    assert len(rooms) <= MOST_ROOMS


@pytest.mark.parametrize("station", walk(), ids=lambda station: station.function)
def test_each_function_is_where_the_walk_says(station: Station) -> None:
    assert station.path.exists()
    assert definition(station) is not None
    file = station.path.relative_to(ROOT / "vllm_sparsed")
    assert f"\n| {station.room} | `{file}` |" in PAGE


@pytest.mark.parametrize(
    "station",
    [station for station in walk() if not station.by_vllm],
    ids=lambda station: station.function,
)
def test_each_function_is_called_on_the_way(station: Station) -> None:
    """From its own room or from one that was entered before."""
    stations = walk()
    before = {other.path for other in stations[: stations.index(station)]} | {station.path}
    name = station.function.rpartition(".")[2]
    assert any(name in called_names(path) for path in before), name


def test_kernels_lie_beneath_all_rooms() -> None:
    graph = import_graph()
    inside = f"vllm_sparsed.{BENEATH}"
    for name, others in graph.items():
        if name.startswith(inside):
            assert all(other.startswith(inside) for other in others), f"{name}: {others}"


def test_no_files_import_each_other_in_a_circle() -> None:
    circle = find_circle(import_graph())
    assert not circle, " -> ".join(circle)


def test_a_circle_would_be_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert find_circle(graph) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "d"}, "b": {"c", "d"}, "c": {"d"}, "d": set()}) == []


def test_imports_inside_functions_count_and_those_for_types_do_not() -> None:
    files = module_files()
    source = """
from typing import TYPE_CHECKING
import vllm_sparsed.logger
from vllm_sparsed.planning import blocks
from vllm_sparsed.kernels.block_selection import MAX_BLOCKS
if TYPE_CHECKING:
    from vllm_sparsed.config.settings import EngineSettings
def function():
    from vllm_sparsed.scheduling.turns import Turn
"""
    assert imported(ast.parse(source), files) == {
        "vllm_sparsed.logger",
        "vllm_sparsed.planning.blocks",
        "vllm_sparsed.kernels.block_selection",
        "vllm_sparsed.scheduling.turns",
    }
