"""The feed-forward layer of experts, on vLLM's fused experts."""

from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform


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
            # vLLM's kernels for CPUs know no map of experts to ranks.
            custom_routing_function=self._route_here
            if current_platform.is_cpu() and _spreads_experts()
            else None,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def _route_here(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best experts by their places on this rank; those of others weigh nothing.

        Args:
            hidden_states: [tokens, hidden_size].
            gating_output: the router's logits [tokens, experts].
            topk: experts of a token.
            renormalize: False.

        Returns:
            float32 weights and int32 places, [tokens, topk] each.
        """
        weights, chosen = gating_output.softmax(dim=-1, dtype=torch.float32).topk(topk, dim=-1)
        places = self.experts.routed_experts.expert_map_manager.expert_map[chosen]
        elsewhere = places < 0
        return weights.masked_fill(elsewhere, 0), places.masked_fill(elsewhere, 0).to(torch.int32)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The experts' sum [tokens, hidden_size], which is still to be added to `residual`."""
        router_logits, _ = self.gate(hidden_states)
        output: torch.Tensor = self.experts(
            hidden_states=hidden_states, router_logits=router_logits
        )
        return output


def _spreads_experts() -> bool:
    """Whether each rank has experts of its own, not a part of each."""
    return (
        get_current_vllm_config().parallel_config.enable_expert_parallel
        and get_tensor_model_parallel_world_size() > 1
    )
