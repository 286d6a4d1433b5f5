"""silu(gate) * up against plain PyTorch in float64."""

import pytest
import torch

from vllm_sparsed.kernels.silu_and_mul import silu_and_mul
from vllm_sparsed.kernels.silu_and_mul.reference import silu_and_mul_reference
from vllm_sparsed.kernels.silu_and_mul.torch_path import silu_and_mul_torch

# The interpreter cuts bfloat16 off instead of rounding it.
CASES = [
    pytest.param("cpu", torch.float16, id="interpreter"),
    pytest.param("cuda", torch.float16, id="gpu-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (63, 111), (5, 1000), (2, 2048), (3, 5000)], ids=str
)
def test_equals_reference(device: str, dtype: torch.dtype, num_tokens: int, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (4 * torch.randn(num_tokens, 2 * width + 8, generator=generator)).to(dtype)
    gate_up = rows[:, : 2 * width]  # strided
    result = silu_and_mul(gate_up.to(device) if device == "cuda" else gate_up).cpu()
    exact = silu_and_mul_reference(gate_up.double())
    usual = (silu_and_mul_reference(gate_up).double() - exact).abs()
    error = (result.double() - exact).abs()
    assert result.dtype == dtype
    assert result.shape == (num_tokens, width)
    assert error.max() <= 2 * usual.max() + torch.finfo(dtype).tiny
    # Rounded once, while PyTorch rounds twice.
    limits = torch.finfo(dtype)
    assert (error <= (0.5 * limits.eps + 1e-5) * exact.abs() + limits.smallest_normal).all()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("device", "dtype"), CASES)
def test_extreme_gates(device: str, dtype: torch.dtype) -> None:
    """No gate overflows: silu goes to 0 on the left and to the gate itself on the right."""
    gate = torch.tensor([torch.finfo(dtype).min, -1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype)
    gate_up = torch.cat((gate, torch.full_like(gate, 2.0)))[None].to(device)
    result = silu_and_mul(gate_up).cpu()[0]
    assert torch.equal(result, torch.where(gate > 0, 2 * gate, torch.zeros_like(gate)))


def test_torch_path() -> None:
    gate_up = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(silu_and_mul_torch(gate_up), silu_and_mul_reference(gate_up))


def test_no_tokens() -> None:
    assert silu_and_mul(torch.empty(0, 8, dtype=torch.bfloat16)).shape == (0, 4)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        pytest.param(torch.zeros(2, 3, dtype=torch.bfloat16), "2 \\* width", id="odd"),
        pytest.param(torch.zeros(2, 2, 2, dtype=torch.bfloat16), "2 \\* width", id="dimensions"),
        pytest.param(torch.zeros(2, 4), "bfloat16 or float16", id="dtype"),
        pytest.param(torch.zeros(4, 4, dtype=torch.bfloat16).T, "contiguous", id="stride"),
    ],
)
def test_arguments_are_checked(gate_up: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        silu_and_mul(gate_up)
