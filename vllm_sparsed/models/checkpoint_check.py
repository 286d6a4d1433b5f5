"""What of a checkpoint's configuration this package implements."""

from typing import Any, Final

# What each key may say. A key that is absent asks for nothing.
_ALLOWED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "LLaDAConfig": {
        "activation_type": ("silu",),
        "alibi": (False, None),
        "attention_layer_norm": (False, None),
        "bias_for_layer_norm": (False, None),
        "block_group_size": (1, None),
        "block_type": ("llama",),
        "clip_qkv": (None,),
        "include_bias": (False, None),
        "input_emb_norm": (False, None),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True, None),
        "multi_query_attention": (False, None),
        "rope": (True,),
        "scale_logits": (False, None),
        "sliding_window": (None,),
    },
    "ILLaDAConfig": {
        "attention_bias": (False, None),
        "hidden_act": ("silu",),
        "mlp_bias": (False, None),
    },
    "LLaDAMoEConfig": {
        "attention_bias": (False, None),
        "hidden_act": ("silu",),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax",),
        "norm_topk_prob": (False, None),
        "qk_layernorm": (True,),
        "routed_scaling_factor": (1.0, None),
        "router_num_group": (None, 1),
        "router_topk_group": (None, 1),
        "router_topk_scaling_factor": (None, 1.0),
        "sliding_window": (None,),
        "use_sliding_window": (False, None),
    },
    "DreamConfig": {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
    },
}

_SHARED_EXPERTS: Final = (
    "shared_expert_intermediate_size",
    "num_shared_experts",
    "n_shared_experts",
)


def check_supported(hf_config: Any) -> None:
    """Refuse a checkpoint that asks for something that is not implemented.

    Args:
        hf_config: of a class of `checkpoint_config`, overrides applied.

    Raises:
        ValueError: names the key, its value and what it may be.
    """
    name = (hf_config.architectures or [hf_config.model_type])[0]
    for key, allowed in _ALLOWED[type(hf_config).__name__].items():
        if hasattr(hf_config, key) and getattr(hf_config, key) not in allowed:
            raise ValueError(
                f"{name}: {key}={getattr(hf_config, key)!r} in config.json is not supported; "
                f"it must be {allowed[0]!r}."
            )
    kinds = getattr(hf_config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds):
        raise ValueError(
            f"{name}: layer_types in config.json must all be 'full_attention', not {kinds}."
        )
    _check_experts(name, hf_config)
    if getattr(hf_config, "rms_norm_eps", None) is None:
        raise ValueError(f"{name}: config.json must have rms_norm_eps or layer_norm_eps.")
    for larger, smaller in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if getattr(hf_config, larger) % getattr(hf_config, smaller):
            raise ValueError(
                f"{name}: {larger}={getattr(hf_config, larger)} must be a multiple of "
                f"{smaller}={getattr(hf_config, smaller)}."
            )
    head_dim = hf_config.hidden_size // hf_config.num_attention_heads
    if getattr(hf_config, "head_dim", None) not in (None, head_dim):
        raise ValueError(
            f"{name}: head_dim={hf_config.head_dim} must be hidden_size / num_attention_heads, "
            f"{head_dim}."
        )


def _check_experts(name: str, hf_config: Any) -> None:
    for key in _SHARED_EXPERTS:
        if getattr(hf_config, key, None) and hasattr(hf_config, "num_experts"):
            raise ValueError(
                f"{name}: {key}={getattr(hf_config, key)!r} is not supported: experts that every "
                "token takes, as those of LLaDA-MoE-v2."
            )
    layers = getattr(hf_config, "moe_layer_freq", None)
    if layers is not None and set(layers if isinstance(layers, list) else [layers]) != {1}:
        raise ValueError(
            f"{name}: moe_layer_freq={layers!r} in config.json must be 1 for every layer."
        )
    if hasattr(hf_config, "num_experts") and not (
        1 <= hf_config.num_experts_per_tok <= hf_config.num_experts
    ):
        raise ValueError(
            f"{name}: num_experts_per_tok={hf_config.num_experts_per_tok} must be from 1 to "
            f"num_experts={hf_config.num_experts}."
        )
