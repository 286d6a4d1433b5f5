"""Which sequences of a batch share a launch of the sparse kernel."""

from collections.abc import Callable

from vllm import LLM

from tests.engine.inspection import runner_of
from vllm_sparsed.attention.metadata import SequencePhase


def test_a_sequence_shorter_than_a_block_chooses_the_kernel_of_no_other(
    engine: Callable[..., LLM],
) -> None:
    runner = runner_of(engine("llada-mha"))
    lengths = [100, 20, 300, 64, 100]
    sizes = [32, 64, 64, 64, 128]
    phases = [
        SequencePhase(16, size, 0.5, pattern_rows=range(-(-length // size)))
        for length, size in zip(lengths, sizes, strict=True)
    ]
    batch = runner.packer.batch(lengths, phases)
    metadata = next(iter(batch.attention.values()))
    groups = [
        (tiles.block_size, tiles.min_seq_len, tiles.max_seq_len, tiles.num_rows)
        for tiles in metadata.tiles
    ]
    assert groups == [(32, 100, 100, 4), (64, 20, 20, 1), (64, 64, 300, 6), (128, 100, 100, 1)]
