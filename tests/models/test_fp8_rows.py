"""Which linear layers take rows in fp8, and their products."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import KernelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear.scaled_mm import cutlass
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8StaticTensorSym,
)

from vllm_sparsed.kernels.fp8_rows.reference import quantize_rows_reference
from vllm_sparsed.models import fp8_rows
from vllm_sparsed.models.fp8_rows import Fp8RowsProduct, accept_fp8_rows, takes_fp8_rows

NAMES = ["weight", "weight_scale", "input_scale", "input_scale_ub"]


def config(
    activations: Any = kFp8DynamicTokenSym,
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (64, 128),
) -> FP8ScaledMMLinearLayerConfig:
    return FP8ScaledMMLinearLayerConfig(
        weight_quant_key=kFp8StaticTensorSym,
        activation_quant_key=activations,
        weight_shape=shape,
        input_dtype=dtype,
        out_dtype=dtype,
    )


@pytest.fixture(autouse=True)
def current_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that has vLLM's kernels."""
    monkeypatch.setattr(cutlass, "cutlass_fp8_supported", lambda: True)


def layer_with(product: Any, **more: Any) -> Any:
    return SimpleNamespace(quant_method=SimpleNamespace(fp8_linear=product), **more)


@pytest.mark.usefixtures("anywhere")
def test_products_of_scaled_rows_accept_them() -> None:
    layer = layer_with(cutlass.CutlassFP8ScaledMMLinearKernel(config(), NAMES))
    accept_fp8_rows(layer)
    assert type(layer.quant_method.fp8_linear) is Fp8RowsProduct
    assert takes_fp8_rows(layer)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("options", "more"),
    [
        pytest.param({"activations": kFp8DynamicTensorSym}, {}, id="one scale"),
        pytest.param({"dtype": torch.float32}, {}, id="float32"),
        pytest.param({"shape": (64, 40000)}, {}, id="wide rows"),
        pytest.param({}, {"input_scale_ub": torch.ones(1)}, id="bounded scales"),
    ],
)
def test_other_products_do_not(options: dict[str, Any], more: dict[str, Any]) -> None:
    product = cutlass.CutlassFP8ScaledMMLinearKernel(config(**options), NAMES)
    layer = layer_with(product, **more)
    accept_fp8_rows(layer)
    assert layer.quant_method.fp8_linear is product
    assert not takes_fp8_rows(layer)


@pytest.mark.usefixtures("anywhere")
def test_not_where_products_must_not_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM reads its environment once.
    monkeypatch.setattr(fp8_rows, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=True))
    layer = layer_with(cutlass.CutlassFP8ScaledMMLinearKernel(config(), NAMES))
    accept_fp8_rows(layer)
    assert not takes_fp8_rows(layer)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("kernels", "shape", "dtype", "by_pytorch"),
    [
        pytest.param({}, (64, 4096), torch.bfloat16, True, id="narrow"),
        pytest.param({}, (64, 4112), torch.bfloat16, False, id="wide"),
        pytest.param({}, (72, 4096), torch.bfloat16, False, id="padded"),
        pytest.param({}, (64, 4096), torch.float16, False, id="float16"),
        pytest.param(
            {"linear_backend": "cutlass"},
            (64, 4096),
            torch.bfloat16,
            False,
            id="chosen",
        ),
        pytest.param(
            {"linear_backend_per_quant": {"fp8_w8a8": "cutlass"}},
            (64, 4096),
            torch.bfloat16,
            False,
            id="chosen for fp8",
        ),
    ],
)
def test_which_product_multiplies(
    kernels: dict[str, Any],
    shape: tuple[int, int],
    dtype: torch.dtype,
    by_pytorch: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper = SimpleNamespace(is_device_capability=lambda capability: capability == 90)
    monkeypatch.setattr(fp8_rows, "current_platform", hopper)
    with set_current_vllm_config(VllmConfig(kernel_config=KernelConfig(**kernels))):
        product = Fp8RowsProduct(config(shape=shape, dtype=dtype), NAMES)
    assert product.by_pytorch == by_pytorch


def test_unquantized_layers_stay_as_they_are() -> None:
    layer: Any = SimpleNamespace(quant_method=SimpleNamespace())
    accept_fp8_rows(layer)
    assert not takes_fp8_rows(layer)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("per_column", [True, False], ids=["columns", "one scale"])
@pytest.mark.parametrize(
    ("num_tokens", "output_size", "input_size"),
    [(1, 64, 128), (63, 4608, 3584), (300, 256, 5008), (257, 80, 128)],
    ids=str,
)
def test_product_on_gpu(
    num_tokens: int, output_size: int, input_size: int, per_column: bool, biased: bool
) -> None:
    """Against float64, by PyTorch for narrow rows and by vLLM's kernel for others."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: Any = {"device": "cuda", "generator": generator}
    rows, row_scales = quantize_rows_reference(torch.randn(num_tokens, input_size, **options))
    weight, scales = quantize_rows_reference(torch.randn(output_size, input_size, **options))
    if not per_column:
        scales = scales.amax().reshape(1)
    bias = torch.randn(output_size, **options, dtype=torch.bfloat16) if biased else None
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.t(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    shape = (output_size, input_size)
    product = Fp8RowsProduct(config(shape=shape), NAMES)
    product.process_weights_after_loading(layer)
    result = product.apply_scaled_mm(
        A=rows,
        B=layer.weight,
        out_dtype=torch.bfloat16,
        As=row_scales,
        Bs=layer.weight_scale,
        bias=bias,
        output_shape=[num_tokens, output_size],
    )
    exact = (rows.double() * row_scales) @ (weight.double() * scales.reshape(-1, 1)).t()
    if bias is not None:
        exact += bias
    assert result.dtype == torch.bfloat16 and result.shape == exact.shape
    # bfloat16 rounds by 2**-9 at most, and the tensor cores' sums keep 13 bits after the point.
    assert (result.double() - exact).norm() < 2**-8 * exact.norm()
