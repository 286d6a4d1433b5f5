"""What all attention kernels share: dimensions, chips, and who may read the tests' oracles."""

import ast
from pathlib import Path

import pytest

from vllm_sparsed.kernels.dimensions import CAPABILITIES, known_capability

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_chip_with_configurations_of_its_own(capability: tuple[int, int]) -> None:
    assert known_capability(capability) == capability


@pytest.mark.parametrize(
    ("capability", "known"),
    [((8, 7), (8, 6)), ((7, 5), (8, 6)), ((10, 0), (8, 6)), ((12, 0), (8, 6))],
)
def test_other_chips(capability: tuple[int, int], known: tuple[int, int]) -> None:
    assert known_capability(capability) == known


def test_references_are_the_tests_oracles_alone() -> None:
    """Nothing that serves imports a module called reference."""
    files = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "vllm_sparsed").rglob("*.py")]
    assert len(files) > 50
    for file in files:
        if file.name == "reference.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert "reference" not in node.module.split("."), file
