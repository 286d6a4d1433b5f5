"""The feed-forward layer of experts, on vLLM's fused experts."""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.quantization import QuantizationConfig


class Experts(nn.Module):
    """SwiGLU experts, of which each token takes the best few.

    The router's softmax is over all experts, in float32; the weights of the chosen ones are not
    renormalised.

    Attributes:
        consumer: None: the router reads hidden states in the model's dtype.
    """

    consumer: None = None

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            renormalize=False,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The experts' sum [tokens, hidden_size], which is still to be added to `residual`."""
        router_logits, _ = self.gate(hidden_states)
        output: torch.Tensor = self.experts(
            hidden_states=hidden_states, router_logits=router_logits
        )
        return output
