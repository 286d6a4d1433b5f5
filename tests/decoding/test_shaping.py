"""What cuts a distribution off gives each row the same in any batch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sparsed.decoding.shaping import keep_top_p


class NoScanOfOneRow(TorchDispatchMode):
    """Refuses the one shape whose floating-point scan CUDA adds up in a varying order."""

    scans = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::cumsum":
            assert args[0].numel() > args[0].shape[args[1]]
            self.scans += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_rows_of_top_p_are_never_scanned_alone(num_rows: int) -> None:
    logits = torch.randn(num_rows, 1000, generator=torch.Generator().manual_seed(1))
    with NoScanOfOneRow() as mode:
        keep_top_p(logits, torch.full((num_rows,), 0.9, dtype=torch.float64))
    assert mode.scans == 1


@pytest.mark.parametrize("vocab", [1, 2, 37, 1000, 32003])
def test_a_row_alone_is_cut_as_within_a_batch(vocab: int) -> None:
    logits = 3 * torch.randn(6, vocab, generator=torch.Generator().manual_seed(2))
    top_p = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999, 0.3], dtype=torch.float64)
    together = keep_top_p(logits, top_p)
    alone = [keep_top_p(logits[i : i + 1], top_p[i : i + 1]) for i in range(6)]
    assert torch.equal(torch.cat(alone), together)
    kept = together.isfinite().sum(dim=1)
    assert kept[0] == 1
    assert vocab < 1000 or 1 < kept[2] < kept[3] < vocab
