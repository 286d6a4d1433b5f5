"""The pattern store: what the server's settings give a request fits it, and what fits is sparse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparsed.config.parameters import parse_server_settings, request_parameters
from vllm_sparsed.config.settings import pattern_store_size
from vllm_sparsed.kernels.pattern_building import generation_start_block, kept_blocks_bound

SELECTS = st.none() | st.floats(0.01, 1)
BLOCK_SIZES = st.none() | st.sampled_from([16, 32, 64, 128])


@given(st.data(), SELECTS, BLOCK_SIZES, st.booleans(), st.integers(1, 20_000))
def test_any_request_fits_by_itself(
    data: st.DataObject,
    select: float | None,
    block_size: int | None,
    short_rows: bool,
    max_model_len: int,
) -> None:
    max_canvas = data.draw(st.none() | st.integers(1, max_model_len))
    server = parse_server_settings(
        {"sparsed": {"select": select, "block_size": block_size, "max_canvas": max_canvas}},
        "origin",
    )
    store = pattern_store_size(server, max_model_len, max_model_len, short_rows)
    assert store is not None
    parameters = request_parameters({}, server)
    length = data.draw(st.integers(1, max_model_len))
    canvas = data.draw(st.integers(1, min(length, max_canvas or length)))
    block, kept = parameters.pattern_settings(length)
    blocks = -(-length // block)
    generation = blocks - generation_start_block(length, canvas, block)
    assert blocks <= store.num_rows
    assert kept_blocks_bound(blocks, generation, kept) <= store.width


@pytest.mark.parametrize(
    ("sparsed", "max_model_len", "short_rows", "rows"),
    [
        ({}, 65536, False, 576),
        ({}, 65536, True, 2304),
        ({"block_size": 128}, 65536, True, 576),
        ({"block_size": 64}, 65536, False, 1152),
        ({}, 2048, False, 2304),
        ({}, 4096, False, 576),
    ],
)
def test_rows_are_for_a_full_batch(
    sparsed: dict[str, object], max_model_len: int, short_rows: bool, rows: int
) -> None:
    """Of short requests or of long ones."""
    server = parse_server_settings({"sparsed": sparsed}, "origin")
    store = pattern_store_size(server, max_model_len, 65536, short_rows)
    assert store is not None
    assert store.num_rows == rows


def test_one_short_request_always_fits() -> None:
    for max_batch_tokens, sequences in ((4096, 2), (4095, 1)):
        server = parse_server_settings({}, "origin")
        store = pattern_store_size(server, 4095, max_batch_tokens, False)
        assert store is not None
        assert store.num_rows == sequences * 64


def test_none_where_all_is_dense() -> None:
    server = parse_server_settings({"sparsed": {"enabled": False}}, "origin")
    assert pattern_store_size(server, 4096, 4096, False) is None
