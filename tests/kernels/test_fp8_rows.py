"""Norm and gate with rows in fp8, against plain PyTorch and vLLM's quantization."""

import pytest
import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FP8
from vllm_sparsed.kernels.fp8_rows import rms_norm_fp8, silu_and_mul_fp8
from vllm_sparsed.kernels.fp8_rows.configs import LARGEST
from vllm_sparsed.kernels.fp8_rows.reference import quantize_rows_reference, rms_norm_reference
from vllm_sparsed.kernels.fp8_rows.torch_path import rms_norm_fp8_torch, silu_and_mul_fp8_torch
from vllm_sparsed.kernels.fp8_rows.wrapper import tiles
from vllm_sparsed.kernels.silu_and_mul import silu_and_mul
from vllm_sparsed.kernels.silu_and_mul.reference import silu_and_mul_reference

# The interpreter cuts bfloat16 off instead of rounding it.
CASES = [
    pytest.param("cpu", torch.float16, id="interpreter"),
    pytest.param("cuda", torch.float16, id="gpu-float16", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=pytest.mark.gpu),
]
EPSILON = 1e-5
# Half a unit in the last of three bits, of values that are not below the smallest normal one.
ROUNDING = 2.0**-4
SUBNORMAL = 2.0**-10
SMALLEST_NORMAL = 2.0**-6


def rows(num_tokens: int, width: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Strided, one row of zeros, and rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, width + 8, generator=generator)
    x *= torch.logspace(-2, 1, num_tokens)[:, None]
    x[num_tokens // 2] = 0
    return x.to(dtype).to(device)[:, :width]


def to_be_trusted(exact: Tensor, device: str) -> Tensor:
    """Where the conversion to fp8 of values `exact`, already scaled, is right: on GPUs everywhere.

    Triton's interpreter rounds 126 to 64 (up to a power of two without going up one exponent), ties
    away from 0, and subnormal values not to the nearest.
    """
    if device != "cpu":
        return torch.ones_like(exact, dtype=torch.bool)
    halves = torch.frexp(exact.abs())[0] * 32  # odd: a tie
    return (halves < 31) & (halves % 2 != 1) & (exact.abs() >= SMALLEST_NORMAL)


def assert_quantized(data: Tensor, scales: Tensor, exact: Tensor, trusted: str = "cuda") -> None:
    """data * scales is exact (float64), rounded to fp8 once, as far as device `trusted` can."""
    assert data.dtype == FP8 and data.shape == exact.shape
    assert scales.dtype == torch.float32 and scales.shape == (len(exact), 1)
    data, scales = data.cpu().double(), scales.cpu().double()
    largest = exact.abs().amax(dim=1, keepdim=True)
    wanted = (largest / LARGEST).clamp_min(1 / (LARGEST * 512))
    torch.testing.assert_close(scales, wanted, rtol=1e-5, atol=0)
    error = (data * scales - exact).abs()
    limit = (1 + 1e-3) * (ROUNDING * exact.abs() + SUBNORMAL * wanted)
    assert ((error <= limit) | ~to_be_trusted(exact / wanted, trusted)).all()
    assert (data[largest[:, 0] > 0].abs().amax(dim=1) == LARGEST).all()


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (63, 111), (3, 1024), (5, 1500), (2, 12288)], ids=str
)
def test_gate_is_the_quantized_gate(
    device: str, dtype: torch.dtype, num_tokens: int, width: int
) -> None:
    """Bit for bit what the gate, and then the quantization, give."""
    gate_up = rows(num_tokens, 2 * width, dtype, device, width)
    data, scales = silu_and_mul_fp8(gate_up)
    gated = silu_and_mul(gate_up).cpu()
    expected_data, expected_scales = quantize_rows_reference(gated)
    assert torch.equal(scales.cpu(), expected_scales)
    same = data.cpu().view(torch.uint8) == expected_data.view(torch.uint8)
    trusted = to_be_trusted(gated.float() / expected_scales, device)
    assert (same | ~trusted).all()
    assert width < 1000 or trusted[0].float().mean() > 0.8


@pytest.mark.gpu
def test_quantized_as_vllm_does() -> None:
    from vllm import _custom_ops as ops

    gate_up = rows(255, 2 * 1500, torch.bfloat16, "cuda", 0)
    data, scales = silu_and_mul_fp8(gate_up)
    wanted, wanted_scales = ops.scaled_fp8_quant(
        silu_and_mul(gate_up), use_per_token_if_dynamic=True
    )
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(data.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("added", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (63, 111), (3, 1024), (5, 3584)], ids=str
)
def test_norm(device: str, dtype: torch.dtype, num_tokens: int, width: int, added: bool) -> None:
    x = rows(num_tokens, width, dtype, device, width)
    residual = rows(num_tokens, width, dtype, device, width + 1) if added else None
    weight = (1 + torch.rand(width, generator=torch.Generator().manual_seed(2))).to(dtype)
    total = x.cpu().float() if residual is None else x.cpu().float() + residual.cpu().float()
    total = total.to(dtype)
    before = x.clone()
    data, scales = rms_norm_fp8(x, residual, weight.to(device), EPSILON)
    assert torch.equal(x, before)
    if residual is not None:
        assert torch.equal(residual.cpu(), total)
    exact = rms_norm_reference(total.double(), weight.double(), EPSILON)
    assert_quantized(data, scales, exact, device)


def test_cpu_tensors_take_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gate_up = rows(5, 128, torch.bfloat16, "cpu", 0)
    data, scales = silu_and_mul_fp8(gate_up)
    expected = quantize_rows_reference(silu_and_mul(gate_up))
    assert torch.equal(data.float(), expected[0].float())
    assert torch.equal(scales, expected[1])
    residual = rows(5, 128, torch.bfloat16, "cpu", 1)
    total = gate_up + residual
    weight = torch.full((128,), 1.5, dtype=torch.bfloat16)
    data, scales = rms_norm_fp8(gate_up, residual, weight, EPSILON)
    assert torch.equal(residual, total)
    assert_quantized(data, scales, rms_norm_reference(total.double(), weight.double(), EPSILON))


@pytest.mark.parametrize("width", [1, 2, 3, 111, 4096, 12288, 18944, 32768])
def test_tiles_cover_a_row(width: int) -> None:
    first, rest = tiles(width)
    assert width <= first + rest < 2 * width
    assert first.bit_count() == 1 and rest.bit_count() <= 1
    assert first <= width


def test_no_tokens() -> None:
    x = torch.empty(0, 8, dtype=torch.bfloat16)
    data, scales = silu_and_mul_fp8(x)
    assert data.shape == (0, 4) and scales.shape == (0, 1)
    data, scales = rms_norm_fp8(x, None, torch.ones(8, dtype=torch.bfloat16), EPSILON)
    assert data.shape == (0, 8) and scales.shape == (0, 1)


HALF = torch.zeros(2, 4, dtype=torch.bfloat16)
WEIGHT = torch.ones(4, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        pytest.param(HALF[:, :3], "gate_up must be \\[tokens, 2 \\* width\\]", id="odd"),
        pytest.param(HALF[None], "gate_up must be \\[tokens, 2 \\* width\\]", id="dimensions"),
        pytest.param(HALF[:, :0], "gate_up must have a width of 1 to 32768, got 0", id="empty"),
        pytest.param(HALF[:1].expand(1, 4).repeat(1, 20000), "got 40000", id="wide"),
        pytest.param(HALF.float(), "gate_up must be bfloat16 or float16", id="dtype"),
        pytest.param(HALF.repeat(2, 1).T, "gate_up must be contiguous", id="stride"),
    ],
)
def test_arguments_of_the_gate_are_checked(gate_up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        silu_and_mul_fp8(gate_up)


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        pytest.param(HALF[0], None, WEIGHT, "x must be \\[tokens, width\\]", id="dimensions"),
        pytest.param(HALF.float(), None, WEIGHT, "x must be bfloat16 or float16", id="dtype"),
        pytest.param(HALF, HALF[:1], WEIGHT, "residual must be .* like x", id="residual shape"),
        pytest.param(HALF, HALF.half(), WEIGHT, "residual must be .* like x", id="residual dtype"),
        pytest.param(HALF, None, WEIGHT[:3], "weight must be contiguous", id="weight shape"),
        pytest.param(HALF, None, WEIGHT.half(), "weight must be contiguous", id="weight dtype"),
    ],
)
def test_arguments_of_the_norm_are_checked(
    x: Tensor, residual: Tensor | None, weight: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm_fp8(x, residual, weight, EPSILON)


def test_torch_path_of_the_gate() -> None:
    gate_up = rows(9, 64, torch.bfloat16, "cpu", 0)
    expected = quantize_rows_reference(silu_and_mul_reference(gate_up))
    assert all(
        torch.equal(x.float(), y.float())
        for x, y in zip(silu_and_mul_fp8_torch(gate_up), expected, strict=True)
    )


@pytest.mark.parametrize("added", [False, True])
def test_torch_path_of_the_norm(added: bool) -> None:
    x, weight = rows(9, 64, torch.bfloat16, "cpu", 0), torch.rand(64).bfloat16()
    residual = rows(9, 64, torch.bfloat16, "cpu", 1).clone() if added else None
    total = x if residual is None else x + residual
    data, scales = rms_norm_fp8_torch(x, residual, weight, EPSILON)
    assert_quantized(data, scales, rms_norm_reference(total.double(), weight.double(), EPSILON))
    assert residual is None or torch.equal(residual, total)
