"""Which quantized weights run on this platform."""

from typing import TYPE_CHECKING, Final

from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# vLLM's names of one format differ by the kernel that it takes.
_ON_CPUS: Final = (
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "compressed-tensors",
    "gptq",
    "gptq_marlin",
)


def check_quantization(model_config: "ModelConfig") -> None:
    """Refuse what vLLM's CPU build has no kernels for: it would fail in the first forward pass.

    Raises:
        ValueError: names the format and what runs there.
    """
    method = model_config.quantization
    if method is None or not current_platform.is_cpu():
        return
    name = model_config.architecture
    if model_config.get_num_experts() > 0:
        raise ValueError(
            f"{name}: quantized experts ({method}) are not supported on CPUs; serve the checkpoint "
            "that is not quantized, or on a GPU."
        )
    if method not in _ON_CPUS:
        raise ValueError(
            f"{name}: quantization {method} is not supported on CPUs; there it may be GPTQ, AWQ or "
            "compressed-tensors."
        )
