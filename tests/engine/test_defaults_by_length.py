"""Short and long requests get the settings that SparseD was released with for their lengths."""

from collections.abc import Callable

import pytest
from vllm import LLM

from tests.engine.inspection import runner_of
from tests.engine.test_crossover import request, tokens_of
from vllm_sparsed.kernels.pattern_building import generation_start_block, kept_blocks_bound

SHORT, LONG = 2048, 2049
STEPS = 6


@pytest.fixture
def llm(engine: Callable[..., LLM]) -> LLM:
    return engine(
        "llada-mha",
        2 * LONG,
        max_model_len=LONG,
        hf_overrides={"max_sequence_length": LONG},
        additional_config={"sparsed": {"dense_if_faster": False}},
    )


def test_both_in_one_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own settings, and the tokens that it has alone."""
    runner = runner_of(llm)
    store = runner.store
    assert store is not None
    taken: list[list[int]] = []
    allocate = store.allocate

    def watch(num_rows: int) -> list[int]:
        taken.append(allocate(num_rows))
        return taken[-1]

    monkeypatch.setattr(store, "allocate", watch)
    requests = [request(length, STEPS) for length in (SHORT, LONG)]
    together = tokens_of(llm, *requests)
    expected = {SHORT: (32, 0.5), LONG: (128, 0.3)}
    for length, (block_size, select) in expected.items():
        blocks = -(-length // block_size)
        (rows,) = [rows for rows in taken if len(rows) == blocks]
        generation = blocks - generation_start_block(length, 32, block_size)
        most = int(store.counts[:, rows].max())
        assert most <= kept_blocks_bound(blocks, generation, select)
        assert most > kept_blocks_bound(blocks, generation, select - 0.1)
    assert len(taken) == 2
    assert [tokens_of(llm, one)[0] for one in requests] == together
    given = request(LONG, STEPS, sparsed_select=0.3, sparsed_block_size=128)
    assert tokens_of(llm, given)[0] == together[1]
