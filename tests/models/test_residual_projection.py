"""Projections that add to the residual sum themselves."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config

from tests.models.loading import LoadedModel
from vllm_sparsed.models import layers
from vllm_sparsed.models.layers import ResidualRowParallelLinear

pytestmark = pytest.mark.usefixtures("parallel_groups")

LLADA = Path(__file__).resolve().parents[1] / "golden" / "llada-mha"


def projection(bias: bool = False) -> ResidualRowParallelLinear:
    with set_current_vllm_config(VllmConfig()):
        layer = ResidualRowParallelLinear(24, 16, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)))
    return layer


def test_only_plain_products_can_add() -> None:
    assert projection().is_plain_product
    assert not projection(bias=True).is_plain_product


def test_not_where_products_must_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM reads its environment once.
    monkeypatch.setattr(layers, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=True))
    assert not projection().is_plain_product


def test_cpus_leave_the_sum_to_the_norm() -> None:
    loaded = LoadedModel(LLADA)
    layer = loaded.model.model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.input_size)
    residual = torch.ones(5, layer.output_size)
    with torch.inference_mode():
        pending = layer.add_to(residual, x)
    assert torch.equal(residual, torch.ones_like(residual))
    assert torch.equal(pending, layer(x)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_product_adds_on_gpu(dtype: torch.dtype) -> None:
    """Rounded once: at most the error of a product and a sum."""
    layer = projection().to("cuda", dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(63, 24, generator=generator).to(dtype)
    before = torch.randn(63, 16, generator=generator).to(dtype)
    exact = before.double() + x.double() @ layer.weight.cpu().double().T
    usual = (before + torch.nn.functional.linear(x, layer.weight.cpu())).double() - exact
    residual = before.cuda()
    with torch.inference_mode():
        assert layer.add_to(residual, x.cuda()) is None
    error = (residual.cpu().double() - exact).abs()
    assert error.max() <= 2 * usual.abs().max()
    assert error.mean() <= usual.abs().mean() * 1.1
