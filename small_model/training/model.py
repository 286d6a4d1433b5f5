"""LLaDA's architecture for training, its tensors under LLaDA's names."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import (
    embedding,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions; the embedding is also the head."""

    vocab_size: int
    d_model: int = 256
    n_heads: int = 4
    n_layers: int = 8
    mlp_hidden_size: int = 576
    max_sequence_length: int = 8192
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    """One layer: attention to every token, then a gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.d_model, shape.mlp_hidden_size
        self.n_heads, self.eps = shape.n_heads, shape.rms_norm_eps
        self.attn_norm = nn.Parameter(torch.ones(width))
        self.ff_norm = nn.Parameter(torch.ones(width))
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, width, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.ff_proj, self.up_proj):
            nn.init.normal_(projection.weight, std=0.02)
        for projection in (self.attn_out, self.ff_out):
            nn.init.normal_(projection.weight, std=0.02 / (2 * shape.n_layers) ** 0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, L, width], cos and sin [L, D / 2] -> [B, L, width]."""
        normed = rms_norm(x, x.shape[-1:], self.attn_norm, self.eps)
        query, key, value = (
            projection(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value
        )
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = rms_norm(x, x.shape[-1:], self.ff_norm, self.eps)
        return x + self.ff_out(silu(self.ff_proj(normed)) * self.up_proj(normed))


class Model(nn.Module):
    """The whole model; logits only where they are asked for."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Parameter(torch.randn(shape.vocab_size, shape.d_model) * 0.02)
        self.ln_f = nn.Parameter(torch.ones(shape.d_model))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        half = shape.d_model // shape.n_heads // 2
        frequencies = 1.0 / shape.rope_theta ** (torch.arange(half, dtype=torch.float32) / half)
        positions = torch.arange(shape.max_sequence_length, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [positions, vocabulary] of tokens [B, L] at positions of its flattened form."""
        x = embedding(tokens, self.wte)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        chosen = x.flatten(0, 1).index_select(0, positions)
        chosen = rms_norm(chosen, chosen.shape[-1:], self.ln_f, self.shape.rms_norm_eps)
        return linear(chosen, self.wte)

    def llada_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights as LLaDA's checkpoints name them, on the CPU."""
        named = {}
        for name, parameter in self.named_parameters():
            plain = name.removesuffix(".weight")
            named[f"model.transformer.{plain}.weight"] = parameter.detach().to("cpu", dtype)
        return {name: tensor.contiguous() for name, tensor in named.items()}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, heads, L, D] in float32: element d pairs with d + D / 2."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def save_served_model(
    model: Model, tokenizer: Path, folder: Path, *, mask: int, end: int, turn_end: int
) -> None:
    """Write a folder that vLLM serves: config.json, weights in bfloat16, tokenizer, defaults.

    Args:
        model: the weights.
        tokenizer: folder of tokenizer.json and tokenizer_config.json.
        folder: made where it is missing.
        mask: token of an undecided position.
        end: end of text.
        turn_end: end of an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **asdict(model.shape),
        "n_kv_heads": model.shape.n_heads,
        "embedding_size": model.shape.vocab_size,
        "weight_tying": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "layer_norm_type": "rms",
        "block_type": "llama",
        "activation_type": "silu",
        "rope": True,
        "mask_token_id": mask,
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
    generation = {"eos_token_id": [end, turn_end], "max_new_tokens": 32}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer.resolve() != folder.resolve():
            shutil.copy(tokenizer / name, folder / name)
    save_file(
        model.llada_tensors(torch.bfloat16), folder / "model.safetensors", metadata={"format": "pt"}
    )
