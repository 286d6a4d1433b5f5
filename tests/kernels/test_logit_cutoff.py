"""The cutoff of top_p and top_k against sorting, and that a row's is its own in any batch."""

import pytest
import torch

from vllm_sparsed.decoding.shaping import keep_top_k, keep_top_p
from vllm_sparsed.kernels.logit_cutoff import logit_cutoff
from vllm_sparsed.kernels.logit_cutoff.reference import logit_cutoff_reference

DEVICES = [
    pytest.param("cpu", id="interpreter"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
TOP_P = (1e-6, 0.3, 0.75, 0.95, 0.999)
TOP_K = (1, 3, 17, 10**6)


def random_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    wide = 3 * torch.randn(rows, vocab + 5, generator=generator)
    wide[:, ::11] = -torch.inf
    return wide.to(dtype).to(device)[:, 1 : vocab + 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [2, 37, 3001])
def test_equals_reference(vocab: int, dtype: torch.dtype, device: str) -> None:
    logits = random_logits(5, vocab, dtype, device)
    temperature = torch.tensor([0.5, 1.0, 1.3, 2.0, 0.9]).double().to(device)
    top_p = torch.tensor(TOP_P).double().to(device)
    top_k = torch.tensor([3, 1, 17, vocab, 5]).clamp(max=vocab).to(device)
    scaled = (logits.float() / temperature.float()[:, None]).cpu()
    for given in ({"top_p": top_p}, {"top_k": top_k}, {"top_p": top_p, "top_k": top_k}):
        found = logit_cutoff(logits, temperature=temperature, **given).cpu()
        for row in range(5):
            expected = logit_cutoff_reference(
                scaled[row].tolist(),
                TOP_P[row] if "top_p" in given else 1.0,
                int(top_k[row]) if "top_k" in given else 0,
            )
            kept = scaled[row] >= found[row]
            assert torch.equal(kept, scaled[row] >= expected), (row, given.keys())


@pytest.mark.parametrize("device", DEVICES)
def test_keeps_what_sorting_the_vocabulary_keeps(device: str) -> None:
    logits = random_logits(8, 2500, torch.float32, device)
    top_p = torch.linspace(0.1, 0.99, 8, dtype=torch.float64, device=device)
    top_k = torch.arange(1, 9, device=device) * 30
    shaped = keep_top_k(keep_top_p(logits, top_p), top_k, 240)
    cutoff = logit_cutoff(logits, top_p=top_p, top_k=top_k)
    assert torch.equal(logits >= cutoff[:, None], (shaped > -torch.inf))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_cut_alone_as_in_a_batch(device: str) -> None:
    logits = random_logits(9, 3000, torch.bfloat16, device)
    top_p = torch.full((9,), 0.9, dtype=torch.float64, device=device)
    together = logit_cutoff(logits, top_p=top_p)
    alone = [logit_cutoff(logits[i : i + 1], top_p=top_p[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 256])
def test_a_real_vocabulary_on_gpu(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, 152_064, generator=generator)).cuda()
    top_p = torch.full((rows,), 0.95, dtype=torch.float64, device="cuda")
    top_k = torch.full((rows,), 50, device="cuda")
    kept = (logits >= logit_cutoff(logits, top_p=top_p)[:, None]).sum(1)
    sorted_kept = (keep_top_p(logits, top_p) > -torch.inf).sum(1)
    # Sums of 152,064 float32 numbers differ in their last digits with their order.
    assert (kept - sorted_kept).abs().max() <= 3
    assert torch.equal(
        logits >= logit_cutoff(logits, top_k=top_k)[:, None],
        keep_top_k(logits, top_k, 50) > -torch.inf,
    )


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(4), {}, "logits must"),
        (torch.zeros(4, 4).T, {}, "logits must"),
        (torch.zeros(2, 4), {"top_p": torch.zeros(2)}, "top_p must"),
        (torch.zeros(2, 4), {"top_k": torch.zeros(3, dtype=torch.int64)}, "top_k must"),
    ],
    ids=["dimensions", "stride", "dtype", "length"],
)
def test_arguments_are_checked(logits: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_cutoff(logits, **options)
