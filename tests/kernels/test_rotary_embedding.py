"""The rotary embedding against plain PyTorch in float64."""

import pytest
import torch
from torch import Tensor

from vllm_sparsed.kernels.rotary_embedding import rotary_embedding
from vllm_sparsed.kernels.rotary_embedding.reference import rotary_embedding_reference
from vllm_sparsed.kernels.rotary_embedding.torch_path import rotate_torch

# The interpreter cuts bfloat16 off instead of rounding it.
CASES = [
    pytest.param("cpu", dtype, id=f"interpreter-{dtype}")
    for dtype in (torch.float16, torch.float32)
] + [
    pytest.param("cuda", dtype, id=f"gpu-{dtype}", marks=pytest.mark.gpu)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


def table(num_positions: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("num_tokens", [1, 63, 111])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(4, 4, 16), (28, 4, 80), (17, 1, 128), (1, 1, 256), (3, 3, 96)],
    ids=lambda value: str(value),
)
def test_equals_reference(
    device: str,
    dtype: torch.dtype,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Views of one projection are rotated in place; values and the space around them stay."""
    generator = torch.Generator().manual_seed(num_tokens)
    heads = [num_heads, num_kv_heads, num_kv_heads]
    before = torch.randn(num_tokens + 2, sum(heads) * head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 200, (num_tokens,), generator=generator)
    cos_sin = table(200, head_dim)

    projected = before.clone().to(device)
    query, key, _ = projected[1:-1].split([n * head_dim for n in heads], dim=-1)
    rotary_embedding(positions.to(device), query, key, cos_sin.to(device))

    after = projected.cpu()
    value_start = (num_heads + num_kv_heads) * head_dim
    assert torch.equal(after[[0, -1]], before[[0, -1]])
    assert torch.equal(after[:, value_start:], before[:, value_start:])
    rotated = after[1:-1, :value_start]
    exact = rotary_embedding_reference(
        positions, before[1:-1, :value_start].double(), cos_sin.double()
    )
    plain = rotary_embedding_reference(positions, before[1:-1, :value_start], cos_sin)
    error, usual = (rotated.double() - exact).abs(), (plain.double() - exact).abs()
    assert rotated.dtype == dtype
    assert error.max() <= 2 * usual.max()
    # Rounded once: half a unit in the last place, and the roundings of float32 before it.
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_path(dtype: torch.dtype) -> None:
    """Bit for bit the reference, in place, on part of a row."""
    rows = torch.randn(11, 6 * 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = rows.clone()
    positions = torch.arange(11).flip(0)
    rotate_torch(positions, rows[:, :64], table(11, 16))
    expected = rotary_embedding_reference(positions, before[:, :64], table(11, 16))
    assert torch.equal(rows, torch.cat((expected, before[:, 64:]), dim=1))


def test_no_tokens() -> None:
    empty = torch.empty(0, 32)
    rotary_embedding(torch.empty(0, dtype=torch.int64), empty, empty, table(4, 16))


@pytest.mark.gpu
def test_many_tokens_on_gpu() -> None:
    """More than 2^31 elements before the last token."""
    num_tokens, row = 70000, 32768
    projected = torch.randn(64, row, dtype=torch.bfloat16, device="cuda").repeat(1100, 1)
    projected = projected[:num_tokens]
    last = projected[-64:].clone()
    positions = torch.arange(num_tokens, device="cuda") % 512
    cos_sin = table(512, 128).cuda()
    rotary_embedding(positions, projected[:, :128], projected[:, 128:256], cos_sin)
    expected = rotary_embedding_reference(positions[-64:], last[:, :256], cos_sin)
    assert (projected[-64:, :256].float() - expected.float()).abs().max() < 0.05
    assert torch.equal(projected[-64:, 256:], last[:, 256:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"cos_sin": table(8, 16).double()}, "cos_sin must be", id="table_dtype"),
        pytest.param({"cos_sin": torch.zeros(8, 15)}, "even head_dim", id="odd"),
        pytest.param({"positions": torch.zeros(4, dtype=torch.int32)}, "positions", id="positions"),
        pytest.param({"positions": torch.arange(5)}, r"query must be \[5", id="number"),
        pytest.param({"query": torch.zeros(4, 40)}, "heads of 16", id="part_of_a_head"),
        pytest.param({"query": torch.zeros(4, 32, dtype=torch.int32)}, "query must", id="dtype"),
        pytest.param({"key": torch.zeros(4, 16).half()}, "dtype of query", id="dtypes"),
        pytest.param({"key": torch.zeros(16, 4).T}, "contiguous heads", id="stride"),
    ],
)
def test_arguments_are_checked(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "positions": torch.arange(4),
        "query": torch.zeros(4, 32),
        "key": torch.zeros(4, 16),
        "cos_sin": table(8, 16),
    }
    with pytest.raises(ValueError, match=message):
        rotary_embedding(**(arguments | change))
