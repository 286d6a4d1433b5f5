"""Tensors inside any class of metadata are found, described and copied."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vllm_sparsed.worker.metadata_tensors import copy_tensors, describe

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True, slots=True)
class Inner:
    rows: torch.Tensor
    size: int


@dataclass
class Outer:
    parts: tuple[Inner, ...]
    lengths: list[int]
    missing: torch.Tensor | None
    store: object


STORE = object()


def outer(**changes: Any) -> Outer:
    parts = (Inner(torch.arange(3), 7), Inner(torch.ones(2, dtype=torch.int32), 8))
    return replace(Outer(parts, [3, 2], None, STORE), **changes)


def test_equal_descriptions_whatever_the_tensors_hold() -> None:
    other = outer(parts=(Inner(torch.tensor([9, 9, 9]), 7), Inner(torch.zeros(2).int(), 8)))
    assert describe(outer(), CPU)[0] == describe(other, CPU)[0]
    assert [t.tolist() for t in describe(other, CPU)[1]] == [[9, 9, 9], [0, 0]]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"parts": ()}, id="number"),
        pytest.param({"parts": (Inner(torch.arange(4), 7), *outer().parts[1:])}, id="shape"),
        pytest.param({"parts": (Inner(torch.arange(3.0), 7), *outer().parts[1:])}, id="dtype"),
        pytest.param({"parts": (Inner(torch.arange(6)[::2], 7), *outer().parts[1:])}, id="stride"),
        pytest.param({"parts": (Inner(torch.arange(3), 9), *outer().parts[1:])}, id="value"),
        pytest.param({"lengths": [3, True]}, id="type"),
        pytest.param({"missing": torch.zeros(1)}, id="presence"),
        pytest.param({"store": object()}, id="object"),
    ],
)
def test_a_difference_that_the_host_sees_shows(changes: dict[str, Any]) -> None:
    if "lengths" in changes:
        assert describe(outer(lengths=[3, 1]), CPU)[0] != describe(outer(**changes), CPU)[0]
    assert describe(outer(), CPU)[0] != describe(outer(**changes), CPU)[0]


def test_tensors_elsewhere_count_with_their_content() -> None:
    other = outer(parts=(Inner(torch.tensor([0, 1, 3]), 7), *outer().parts[1:]))
    assert describe(outer(), META) == describe(outer(), META)
    assert describe(outer(), META)[0] != describe(other, META)[0]
    assert describe(outer(), META)[1] == []


def test_copies_share_everything_but_tensors() -> None:
    original = outer()
    copied = copy_tensors(original, CPU, torch.Tensor.clone)
    assert describe(copied, CPU)[0] == describe(original, CPU)[0]
    copied.parts[0].rows.zero_()
    assert original.parts[0].rows.tolist() == [0, 1, 2]
    assert copied.store is STORE
    assert copy_tensors(original, META, torch.Tensor.clone).parts[0].rows is original.parts[0].rows
