"""These models in plain PyTorch, fast enough to compare with: fused norms and attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.reference.models import Dimensions

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [heads, L, D], k and v [kv heads, L, D]) -> [heads, L, D]; q and k are rotated."""


class PlainModel:
    """A model's forward pass over one sequence, in eager mode."""

    def __init__(self, dimensions: Dimensions, weights: dict[str, Tensor]) -> None:
        """Take tensors under Dream's (Qwen2's) names, of one dtype and device."""
        self.dimensions = dimensions
        self.weights = weights
        self._angles: tuple[Tensor, Tensor] | None = None

    def logits(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Logits [L, vocabulary] of all positions of the tokens [L]."""
        hidden = F.embedding(tokens, self.weights["model.embed_tokens.weight"])
        for layer in range(self.dimensions.num_layers):
            name = f"model.layers.{layer}"
            hidden = hidden + self._attention(layer, hidden, attend)
            normed = self._norm(hidden, f"{name}.post_attention_layernorm")
            if self.dimensions.experts_per_token:
                hidden = hidden + self._experts(normed, f"{name}.mlp")
            else:
                hidden = hidden + self._swiglu(normed, f"{name}.mlp")
        return self._linear(self._norm(hidden, "model.norm"), "lm_head")

    def _swiglu(self, x: Tensor, name: str) -> Tensor:
        gate = F.silu(self._linear(x, f"{name}.gate_proj"))
        gate = gate.mul_(self._linear(x, f"{name}.up_proj"))
        return self._linear(gate, f"{name}.down_proj")

    def _experts(self, x: Tensor, name: str) -> Tensor:
        """Expert after expert, each for the rows that chose it."""
        shares = self._linear(x, f"{name}.gate").softmax(dim=-1, dtype=torch.float32)
        chosen = shares.topk(self.dimensions.experts_per_token, dim=-1)
        mixed = torch.zeros_like(x)
        for expert in range(shares.shape[-1]):
            rows, places = (chosen.indices == expert).nonzero(as_tuple=True)
            output = self._swiglu(x[rows], f"{name}.experts.{expert}")
            mixed.index_add_(0, rows, output * chosen.values[rows, places, None].to(x.dtype))
        return mixed

    def _normed_heads(self, x: Tensor, name: str) -> Tensor:
        """The norm of each head, where the model has one."""
        return self._norm(x, name) if f"{name}.weight" in self.weights else x

    def _attention(self, layer: int, hidden: Tensor, attend: Attend) -> Tensor:
        name = f"model.layers.{layer}"
        normed = self._norm(hidden, f"{name}.input_layernorm")
        q, k, v = (
            self._linear(normed, f"{name}.self_attn.{projection}_proj")
            .unflatten(-1, (-1, self.dimensions.head_dim))
            .transpose(0, 1)
            for projection in "qkv"
        )
        q = self._normed_heads(q, f"{name}.self_attn.q_norm")
        k = self._normed_heads(k, f"{name}.self_attn.k_norm")
        mixed = attend(layer, self._rotate(q), self._rotate(k), v)
        return self._linear(mixed.transpose(0, 1).flatten(1), f"{name}.self_attn.o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.dimensions.rms_norm_eps)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [heads, L, D] in float32: element d pairs with d + D / 2."""
        length, half = x.shape[1], self.dimensions.head_dim // 2
        if self._angles is None or len(self._angles[0]) != length:
            exponents = torch.arange(0, half, dtype=torch.float32, device=x.device) / half
            positions = torch.arange(length, dtype=torch.float32, device=x.device)
            angles = torch.outer(positions, self.dimensions.rope_theta**-exponents)
            self._angles = (angles.cos(), angles.sin())
        cos, sin = self._angles
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)


def dense_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by the backend that it picks."""
    k, v = repeated(k, q), repeated(v, q)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [kv heads, L, D] as [heads, L, D], one for each query head."""
    group = q.shape[0] // x.shape[0]
    return x if group == 1 else x.repeat_interleave(group, dim=0)
