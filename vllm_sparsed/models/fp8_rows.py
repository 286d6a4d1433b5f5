"""Linear layers in fp8 whose rows come quantized from the norm or the gate before them.

vLLM's products of fp8 rows with a scale each (`--quantization fp8`) read 16-bit hidden states and
quantize them first. Here the producer writes fp8, and a layer that takes it says so through vLLM's
own contract (`vllm.model_executor.layers.fusion.quant_activation`).
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    expose_input_quant_key,
    get_input_quant_key,
)
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    QuantKey,
    kFp8DynamicTokenSym,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_sparsed.kernels.fp8_rows import MAX_WIDTH, rms_norm_fp8, silu_and_mul_fp8

PYTORCH_MAX_INPUT: Final = 4096
"""Input sizes up to which PyTorch's product was faster on compute capability 9.0, see
benchmarks/notes/other-layers.md."""


class Fp8RowsProduct(CutlassFP8ScaledMMLinearKernel):
    """vLLM's product of fp8 rows, which may come quantized; PyTorch's where that is faster."""

    def __init__(
        self, config: FP8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]
    ) -> None:
        super().__init__(config, layer_param_names)
        output_size, input_size = config.weight_shape
        chosen = get_current_vllm_config().kernel_config
        self.by_pytorch: bool = (
            chosen.linear_backend == "auto"
            and not chosen.linear_backend_per_quant
            and config.out_dtype == torch.bfloat16
            and current_platform.is_device_capability(90)
            and input_size <= PYTORCH_MAX_INPUT
            and input_size % 16 == output_size % 16 == 0
        )

    def input_quant_key(self) -> QuantKey | None:
        return kFp8DynamicTokenSym

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if self.by_pytorch:
            weight, name = getattr(layer, self.layer_param_names[0]), self.layer_param_names[1]
            # PyTorch wants a scale for each column where each row has one.
            scales = getattr(layer, name).reshape(1, -1).expand(1, weight.shape[1])
            replace_parameter(layer, name, scales.contiguous())

    def apply_scaled_mm(
        self,
        *,
        A: torch.Tensor,
        B: torch.Tensor,
        out_dtype: torch.dtype,
        As: torch.Tensor,
        Bs: torch.Tensor,
        bias: torch.Tensor | None,
        output_shape: list[int],
    ) -> torch.Tensor:
        if not self.by_pytorch:
            return super().apply_scaled_mm(
                A=A,
                B=B,
                out_dtype=out_dtype,
                As=As,
                Bs=Bs,
                bias=bias,
                output_shape=output_shape,
            )
        # Fast accumulation, as in vLLM's kernel.
        product = torch._scaled_mm(
            A, B, scale_a=As, scale_b=Bs, bias=bias, out_dtype=out_dtype, use_fast_accum=True
        )
        return product.view(*output_shape)


def accept_fp8_rows(layer: LinearBase) -> None:
    """Let `layer` take fp8 rows too, where its product is vLLM's CUTLASS one of such rows.

    To be called when the layer is built; other layers stay as they are.
    """
    method: Any = layer.quant_method
    product: Any = getattr(method, "fp8_linear", None)
    if (
        type(product) is CutlassFP8ScaledMMLinearKernel
        and product.config.activation_quant_key == kFp8DynamicTokenSym
        and product.config.input_dtype.itemsize == 2
        and product.config.weight_shape[1] <= MAX_WIDTH
        # FBGEMM's upper bound of the scales.
        and getattr(layer, "input_scale_ub", None) is None
        # Then vLLM may multiply in 16 bits instead.
        and not envs.VLLM_BATCH_INVARIANT
    ):
        method.fp8_linear = Fp8RowsProduct(product.config, product.layer_param_names)
        expose_input_quant_key(layer, method.fp8_linear)


def takes_fp8_rows(layer: LinearBase) -> bool:
    """Whether `layer` may be given the results of this module's functions."""
    return get_input_quant_key(layer) == kFp8DynamicTokenSym


def norm_to_fp8(
    norm: RMSNorm, pending: torch.Tensor | None, residual: torch.Tensor
) -> QuantizedActivation:
    """The norm of residual + pending [tokens, hidden_size], in fp8; the sum replaces `residual`."""
    rows, added = (residual, None) if pending is None else (pending, residual)
    data, scales = rms_norm_fp8(rows, added, norm.weight, norm.variance_epsilon)
    return _activation(data, scales, residual.dtype)


def gate_to_fp8(gate_up: torch.Tensor) -> QuantizedActivation:
    """silu(gate) * up of gate_up [tokens, 2 * intermediate_size], in fp8."""
    return _activation(*silu_and_mul_fp8(gate_up), gate_up.dtype)


def _activation(
    data: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> QuantizedActivation:
    return QuantizedActivation(data, scales, dtype, data.shape, kFp8DynamicTokenSym)
