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
    "DreamConfig": {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
    },
}


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
    for larger, smaller in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if getattr(hf_config, larger) % getattr(hf_config, smaller):
            raise ValueError(
                f"{name}: {larger}={getattr(hf_config, larger)} must be a multiple of "
                f"{smaller}={getattr(hf_config, smaller)}."
            )
