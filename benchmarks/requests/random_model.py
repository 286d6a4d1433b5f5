"""Models of a given shape with random weights, made where they are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference.models import Dimensions


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a shape or a checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors under Dream's (Qwen2's) names, as `ReferenceModel` wants them."""
    dims = Dimensions.from_config(config)
    hidden, head_dim = dims.hidden_size, dims.head_dim
    vocab = config["vocab_size"]
    intermediate = config.get("intermediate_size") or config["mlp_hidden_size"]
    biased = bool(config.get("include_qkv_bias", True)) if not dims.logit_shift else True
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(dims.num_layers):
        name = f"model.layers.{layer}"
        for projection, heads in (
            ("q_proj", dims.num_heads),
            ("k_proj", dims.num_kv_heads),
            ("v_proj", dims.num_kv_heads),
        ):
            shapes[f"{name}.self_attn.{projection}.weight"] = (heads * head_dim, hidden)
            if biased:
                shapes[f"{name}.self_attn.{projection}.bias"] = (heads * head_dim,)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{name}.mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{name}.mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def random_weights(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> dict[str, Tensor]:
    """Normal matrices and biases of standard deviation 0.02, norms of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        weights[name] = tensor
    return weights


def served_weights(model: torch.nn.Module, config: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a model that vLLM holds, under the same names; views, nothing is copied."""
    dims = Dimensions.from_config(config)
    heads, kv_heads = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        parts, names = [tensor], [name]
        if ".qkv_proj." in name:
            parts = list(tensor.split([heads, kv_heads, kv_heads]))
            names = [name.replace("qkv_proj", f"{x}_proj") for x in "qkv"]
        elif ".gate_up_proj." in name:
            parts = list(tensor.chunk(2))
            names = [name.replace("gate_up_proj", x) for x in ("gate_proj", "up_proj")]
        weights.update(zip(names, parts, strict=True))
    vocab = config["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        # vLLM pads the vocabulary.
        weights[name] = weights.get(name, weights["model.embed_tokens.weight"])[:vocab]
    return weights
