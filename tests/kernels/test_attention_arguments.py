"""What the block-sparse attention refuses, and the layout of its query tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_sparsed.kernels.block_sparse_attention import QueryTiles, block_sparse_attention


def arguments(head_dim: int = 16) -> dict[str, Any]:
    """One request of 40 tokens in blocks of 16, 4 query heads on 2."""
    return {
        "q": torch.zeros(40, 4, head_dim),
        "k": torch.zeros(40, 2, head_dim),
        "v": torch.zeros(40, 2, head_dim),
        "indices": torch.zeros(3, 4, 2, dtype=torch.int16),
        "counts": torch.ones(3, 4, dtype=torch.int32),
        "tiles": QueryTiles.build([0], [40], [[0, 1, 2]], 16, "cpu"),
        "scale": 0.25,
        "out": torch.zeros(40, 4, head_dim),
    }


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "q": (lambda x: x[0], "q must be"),
    "q dtype": (lambda x: x.double(), "must have the dtype of q"),
    "k dtype": (lambda x: x.half(), "k must have the dtype"),
    "k": (lambda x: x[1:], "k must be"),
    "v": (lambda x: x[:, :1], "v must have the shape"),
    "v stride": (lambda x: x.repeat(1, 1, 2)[..., ::2], "v must be contiguous"),
    "out": (lambda x: x[:, :1], "out must have the shape"),
    "out device": (lambda x: x.to("meta"), "out must be on"),
    "indices dtype": (lambda x: x.long(), "indices must be int16 or int32"),
    "indices": (lambda x: x[:, :1], "indices must be"),
    "counts": (lambda x: x[:, :1], "counts must be"),
    "counts dtype": (lambda x: x.long(), "counts must be int32"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_arguments_are_checked(change: str) -> None:
    given = arguments()
    name = change.split()[0]
    replace, message = CHANGES[change]
    given[name] = replace(given[name])
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**given)


def test_head_ratio_is_checked() -> None:
    given = arguments() | {"k": torch.zeros(40, 3, 16), "v": torch.zeros(40, 3, 16)}
    with pytest.raises(ValueError, match="no multiple of the 3"):
        block_sparse_attention(**given)


@pytest.mark.parametrize("head_dim", [48, 512])
def test_head_dim_is_checked(head_dim: int) -> None:
    with pytest.raises(ValueError, match="head_dim"):
        block_sparse_attention(**arguments(head_dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_dtype_is_checked(dtype: torch.dtype) -> None:
    given = arguments()
    given |= {name: given[name].to(dtype) for name in ("q", "k", "v", "out")}
    with pytest.raises(ValueError, match="q must be bfloat16"):
        block_sparse_attention(**given)


def test_query_tiles_layout() -> None:
    tiles = QueryTiles.build([3, 100], [65, 16], [[7, 2, 5], [0]], 32, "cpu")
    assert tiles.seq_start.tolist() == [3, 3, 3, 100]
    assert tiles.seq_len.tolist() == [65, 65, 65, 16]
    assert tiles.query_block.tolist() == [0, 1, 2, 0]
    assert tiles.pattern_row.tolist() == [7, 2, 5, 0]
    # Two blocks of 32 make a group of 64; groups never span two requests.
    assert tiles.group_row.tolist() == [0, 2, 3]
    assert (tiles.block_size, tiles.max_seq_len, tiles.min_seq_len) == (32, 65, 16)
    assert tiles.seq_start.dtype == torch.int32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [8], [[0]], 24), "block_size"),
        (([0, 8], [8], [[0]], 16), "one entry per request"),
        (([0], [17], [[0]], 16), r"pattern_rows\[0\] must have 2 entries"),
        (([0], [0], [[]], 16), "seq_lens"),
        (([], [], [], 16), "seq_lens"),
        (([-1], [8], [[0]], 16), "seq_starts"),
        (([0], [8], [[-1]], 16), "pattern_rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_query_tiles_refuse(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QueryTiles.build(*arguments, "cpu")
