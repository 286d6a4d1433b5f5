"""Models of a given shape with random weights, made where they are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.reference.models import Dimensions, llada_name

RANDOM_FORMAT: Final = "random_normal"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a shape or a checkpoint."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def is_tied(config: dict[str, Any]) -> bool:
    """Whether the head is the embedding."""
    return bool(config.get("tie_word_embeddings") or config.get("weight_tying"))


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors under Dream's (Qwen2's) names, as `ReferenceModel` wants them."""
    dims = Dimensions.from_config(config)
    hidden, head_dim = dims.hidden_size, dims.head_dim
    vocab = config["vocab_size"]
    experts = config.get("num_experts", 0)
    inner = "expert_intermediate_size" if experts else "intermediate_size"
    intermediate = config.get(inner) or config["mlp_hidden_size"]
    # Dream has them always.
    biased = dims.logit_shift or bool(config.get("include_qkv_bias", False))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not is_tied(config):
        shapes["lm_head.weight"] = (vocab, hidden)
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
        if config.get("qk_layernorm"):
            shapes[f"{name}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{name}.self_attn.k_norm.weight"] = (head_dim,)
        feed_forward = [f"{name}.mlp"]
        if experts:
            shapes[f"{name}.mlp.gate.weight"] = (experts, hidden)
            feed_forward = [f"{name}.mlp.experts.{expert}" for expert in range(experts)]
        for layer_name in feed_forward:
            shapes[f"{layer_name}.gate_proj.weight"] = (intermediate, hidden)
            shapes[f"{layer_name}.up_proj.weight"] = (intermediate, hidden)
            shapes[f"{layer_name}.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def random_tensors(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Normal matrices and biases of standard deviation 0.02, norms of 1; one after the other."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in tensor_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)
        yield name, tensor


def random_weights(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> dict[str, Tensor]:
    """The same as a whole, with a head where it is tied."""
    weights = dict(random_tensors(config, dtype, device, seed))
    if is_tied(config):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def register_loader() -> str:
    """Give vLLM a load format that draws these weights.

    vLLM's own dummy weights are within 1e-3 of 0: every softmax is flat, and its patterns are
    chance. These also go through quantization as a checkpoint's tensors do.

    Returns:
        The name of the load format, for an engine in this process.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.platforms import current_platform

    class RandomModelLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """There is nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            config = read_config(Path(model_config.model))
            device = self.load_config.device or current_platform.device_type
            named = llada_name if config["architectures"] == ["LLaDAModelLM"] else str
            tensors = random_tensors(config, model_config.dtype, device)
            model.load_weights((named(name), tensor) for name, tensor in tensors)

    register_model_loader(RANDOM_FORMAT)(RandomModelLoader)
    return RANDOM_FORMAT
