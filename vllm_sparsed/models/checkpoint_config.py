"""Configurations of the checkpoints, and what of them this package implements.

vLLM reads `config.json` through these classes, so no remote code is needed. They present the names
that vLLM expects and keep the checkpoint's own as they are.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from transformers import PretrainedConfig

# Rotary scalings whose angles depend on the position alone, and the keys that each needs.
ROPE_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
}

_LLADA_MOE: Final = "LLaDAMoEModelLM"


class _RotaryConfig(PretrainedConfig):
    """Keeps rope_theta, rope_scaling and rope_parameters one thing, whichever is overridden.

    vLLM applies `--hf-overrides` by setting attributes, after the configuration was read: a new
    rope_theta would be ignored and a new rope_scaling would lose the checkpoint's rope_theta.
    """

    default_theta = 10_000.0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rope_theta":
            if value is None:
                return
            name, value = "rope_parameters", {**self.rope_parameters, "rope_theta": value}
        elif name in ("rope_scaling", "rope_parameters"):
            name, value = "rope_parameters", self._complete(value)
        super().__setattr__(name, value)

    def _complete(self, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
        complete = {"rope_type": "default", **(parameters or {})}
        legacy_name = complete.pop("type", None)
        if legacy_name is not None and "rope_type" not in (parameters or {}):
            complete["rope_type"] = legacy_name
        present = self.__dict__.get("rope_parameters", {})
        complete.setdefault("rope_theta", present.get("rope_theta", self.default_theta))
        return complete


class LLaDAConfig(_RotaryConfig):
    """config.json of LLaDA-8B, LLaDA-1.5 and iLLaDA.

    Attributes:
        vocab_size: rows of the embedding, the checkpoint's embedding_size.
        mask_token_id: token of an undecided position.
        eos_token_id: end of text.
    """

    model_type = "llada"
    default_theta = 500_000.0
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int = 4096,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        weight_tying: bool = False,
        include_qkv_bias: bool = False,
        rms_norm_eps: float = 1e-5,
        rope_parameters: dict[str, Any] | None = None,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int | None = 126336,
        eos_token_id: int | None = 126081,
        **kwargs: Any,
    ) -> None:
        """Take the keys of config.json.

        Raises:
            ValueError: the checkpoint is LLaDA-MoE, which has the same model_type.
        """
        if _LLADA_MOE in (kwargs.get("architectures") or ()):
            raise ValueError(
                f"{_LLADA_MOE} (LLaDA-MoE) is not supported; of model_type 'llada' only "
                "LLaDAModelLM is (LLaDA-8B, LLaDA-1.5, iLLaDA)."
            )
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        self.mlp_hidden_size = mlp_ratio * d_model if mlp_hidden_size is None else mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        self.vocab_size = embedding_size or vocab_size
        self.embedding_size = self.vocab_size
        self.weight_tying = weight_tying
        self.include_qkv_bias = include_qkv_bias
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or rope_scaling
        self.rope_theta = rope_theta
        self.mask_token_id = 126336 if mask_token_id is None else mask_token_id
        self.eos_token_id = 126081 if eos_token_id is None else eos_token_id
        super().__init__(**kwargs)


class DreamConfig(_RotaryConfig):
    """config.json of Dream-7B, DiffuCoder and Dream-Coder.

    Attributes:
        mask_token_id: token of an undecided position.
        eos_token_id: end of text.
    """

    model_type = "Dream"
    default_theta = 1_000_000.0

    def __init__(
        self,
        vocab_size: int = 152064,
        hidden_size: int = 3584,
        intermediate_size: int = 18944,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        max_position_embeddings: int = 131072,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = False,
        hidden_act: str = "silu",
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        mask_token_id: int | None = 151666,
        eos_token_id: int | None = 151643,
        **kwargs: Any,
    ) -> None:
        """Take the keys of config.json."""
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = (
            num_attention_heads if num_key_value_heads is None else num_key_value_heads
        )
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.tie_word_embeddings = tie_word_embeddings
        self.hidden_act = hidden_act
        self.use_sliding_window = use_sliding_window
        self.sliding_window = sliding_window if use_sliding_window else None
        self.rope_parameters = rope_parameters or rope_scaling
        self.rope_theta = rope_theta
        self.mask_token_id = 151666 if mask_token_id is None else mask_token_id
        self.eos_token_id = 151643 if eos_token_id is None else eos_token_id
        super().__init__(**kwargs)


# What each key may say. A key that is absent asks for nothing.
_ALLOWED: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "llada": {
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
    "Dream": {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
    },
}


def check_supported(hf_config: Any) -> None:
    """Refuse a checkpoint that asks for something that is not implemented.

    Args:
        hf_config: a `LLaDAConfig` or `DreamConfig`, overrides applied.

    Raises:
        ValueError: names the key, its value and what it may be.
    """
    name = (hf_config.architectures or [hf_config.model_type])[0]
    for key, allowed in _ALLOWED[hf_config.model_type].items():
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
    rope_type = hf_config.rope_parameters["rope_type"]
    if rope_type not in ROPE_KEYS:
        raise ValueError(
            f"{name}: rope_type={rope_type!r} is not supported; it must be one of "
            f"{', '.join(ROPE_KEYS)}."
        )
    for key in ROPE_KEYS[rope_type]:
        if hf_config.rope_parameters.get(key) is None:
            raise ValueError(f"{name}: rope_parameters of rope_type={rope_type!r} need {key}.")
    for key in ("mask_token_id", "eos_token_id"):
        token = getattr(hf_config, key)
        if not isinstance(token, int) or not 0 <= token < hf_config.vocab_size:
            raise ValueError(
                f"{name}: {key}={token!r} in config.json must be a token id below the vocabulary "
                f"size {hf_config.vocab_size}."
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
