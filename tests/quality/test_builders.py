"""The lists of the baselines, block by block."""

import pytest
import torch

from benchmarks.quality.builders import best_blocks, sink_window_blocks, window_blocks


def lists(blocks: torch.Tensor, counts: torch.Tensor, head: int = 0) -> list[list[int]]:
    """The valid part of every row of one head."""
    return [blocks[i, head, : counts[i, head]].tolist() for i in range(len(counts))]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (1, [[0], [1], [2], [3], [4], [5]]),
        (2, [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [4, 5]]),
        (3, [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 5]]),
        (6, [[0, 1, 2, 3, 4, 5]] * 6),
    ],
    ids=["own", "two", "three", "all"],
)
def test_window(kept: int, expected: list[list[int]]) -> None:
    counts = torch.full((6, 1), kept, dtype=torch.int32)
    assert lists(window_blocks(counts, 6), counts) == expected


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (1, [[0], [1], [2], [3], [4], [5]]),
        (2, [[0, 1], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]]),
        (4, [[0, 1, 2, 3]] * 3 + [[0, 2, 3, 4], [0, 3, 4, 5], [0, 3, 4, 5]]),
        (6, [[0, 1, 2, 3, 4, 5]] * 6),
    ],
    ids=["own", "two", "four", "all"],
)
def test_sink_window(kept: int, expected: list[list[int]]) -> None:
    counts = torch.full((6, 1), kept, dtype=torch.int32)
    assert lists(sink_window_blocks(counts, 6), counts) == expected


def test_counts_of_each_row_and_head() -> None:
    counts = torch.tensor([[1, 4], [2, 3], [3, 2], [4, 1]], dtype=torch.int32)
    assert lists(window_blocks(counts, 4), counts, 1) == [[0, 1, 2, 3], [0, 1, 2], [2, 3], [3]]
    assert lists(sink_window_blocks(counts, 4), counts, 0) == [[0], [0, 1], [0, 2, 3], [0, 1, 2, 3]]


def test_best_blocks() -> None:
    """Ascending, as many as the counts say, the lowest among equals."""
    importance = torch.tensor([[[0.1, 0.4, 0.3], [0.2, 0.2, 0.2], [0.5, 0.1, 0.4]]])
    counts = torch.tensor([[2], [2], [1]], dtype=torch.int32)
    assert lists(best_blocks(importance, counts), counts) == [[1, 2], [0, 1], [0]]
