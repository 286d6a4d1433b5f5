"""Which file of the repository imports which, read from the sources."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vllm_sparsed", "kernels", "benchmarks", "small_model", "examples")


def module_files() -> dict[str, Path]:
    """The file of each module; those of kernels/ under the name that they are imported by."""
    files = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("vllm_sparsed", "kernels"):
                continue  # the link to kernels/
            if parts[0] == "kernels":
                parts = ("vllm_sparsed", *parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imported(tree: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """Modules among `known` that a file imports, inside functions too, but not for types alone."""
    found = set()
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports name their package"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known.keys()


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _nodes(other)
            continue
        yield child
        yield from _nodes(child)


def import_graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    files = module_files()
    return {
        name: imported(ast.parse(path.read_text()), files) - {name} for name, path in files.items()
    }


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, its first module again at its end; empty where there is none."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if circle := search(other, [*way, name]):
                return circle
        done.add(name)
        return []

    for name in graph:
        if circle := search(name, []):
            return circle
    return []
