"""Small random checkpoints in the public layout: config keys and tensor names as published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.reference.models import ReferenceModel
from benchmarks.requests.random_model import tensor_shapes

VOCABULARY = 384
MASK, END = 383, 2

_COMMON: Mapping[str, Any] = {
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "mask_token_id": MASK,
    "eos_token_id": END,
    "pad_token_id": END,
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
}

ILLADA: Mapping[str, Any] = {
    **_COMMON,
    "architectures": ["ILLaDAForCausalLM"],
    "model_type": "illada",
    "auto_map": {"AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM"},
    "attention_bias": False,
    "hidden_size": 128,
    "intermediate_size": 256,
    "layer_norm_eps": None,
    "mlp_bias": False,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}

LLADA_MOE: Mapping[str, Any] = {
    **_COMMON,
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "auto_map": {"AutoModel": "modeling_lladamoe.LLaDAMoEModelLM"},
    "attention_bias": False,
    "dense_intermediate_size": 512,
    "expert_intermediate_size": 64,
    "head_dim": 16,
    "hidden_size": 128,
    "moe_layer_freq": [1, 1],
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 1,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """bfloat16, of a size at which every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(dict(config)).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.1 * values
        elif "embed_tokens" not in name:
            # Decided routers: rounding must not choose other experts.
            values = values * shape[-1] ** -0.5 * (8 if "mlp.gate." in name else 1)
        weights[name] = values.bfloat16()
    # A random model would see masks and say masks, above all with a tied head.
    head = "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    weights[f"{head}.weight"][MASK] *= 0.1
    return weights


def fuse_experts(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], gate_up: str, down: str
) -> dict[str, Tensor]:
    """The same weights with one tensor for all experts of a layer, under the given names."""
    fused = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp."
        parts = {
            kind: torch.stack(
                [
                    weights[f"{prefix}experts.{expert}.{kind}_proj.weight"]
                    for expert in range(config["num_experts"])
                ]
            )
            for kind in ("gate", "up", "down")
        }
        fused[prefix + gate_up] = torch.cat((parts["gate"], parts["up"]), dim=1)
        fused[prefix + down] = parts["down"]
    return fused


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor] | None = None
) -> Path:
    """config.json and one file of weights, random ones where none are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    tensors = random_weights(config) if weights is None else weights
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


def reference(folder: Path, dtype: torch.dtype) -> ReferenceModel:
    return ReferenceModel.load(folder, dtype)
