"""Configurations of the checkpoints.

vLLM reads `config.json` through these classes, so no remote code is needed. They present the names
that vLLM expects and keep the checkpoint's own as they are. What decides is the architecture: two
may have the same `model_type`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from transformers import PretrainedConfig

from vllm_sparsed.models.registry import MODELS, UNSERVED, served_architectures, unserved_model
from vllm_sparsed.models.rotary_parameters import complete_parameters, scaled_length


class _CheckpointConfig(PretrainedConfig):
    """Reads config.json through the class of its architecture.

    It keeps rope_theta, rope_scaling and rope_parameters one thing, whichever is overridden: vLLM
    applies `--hf-overrides` by setting attributes, after the configuration was read, and a new
    rope_theta would be ignored and a new rope_scaling would lose the checkpoint's rope_theta.
    """

    default_theta: ClassVar[float] = 10_000.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but an instance of the architecture's class.

        Raises:
            ValueError: an architecture that is not served.
        """
        kind = _class_of(config_dict, cls)
        # Not the one of this class again.
        return super(_CheckpointConfig, kind).from_dict(config_dict, **kwargs)

    def __init__(self, **kwargs: Any) -> None:
        # Another architecture's may stand in config.json.
        kwargs.pop("model_type", None)
        super().__init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rope_theta":
            if value is None:
                return
            name, value = "rope_parameters", {**self.rope_parameters, "rope_theta": value}
        if name in ("rope_scaling", "rope_parameters"):
            present = self.__dict__.get("rope_parameters", {})
            theta = present.get("rope_theta", self.default_theta)
            name, value = "rope_parameters", complete_parameters(value, theta)
            # vLLM takes the positions of these scalings from the configuration.
            length = scaled_length(value)
            if length > self.max_position_embeddings:
                self.max_position_embeddings = length
        super().__setattr__(name, value)


class LLaDAConfig(_CheckpointConfig):
    """config.json of LLaDA.

    Attributes:
        vocab_size: rows of the embedding, the checkpoint's embedding_size.
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
        **kwargs: Any,
    ) -> None:
        """Take the keys of config.json."""
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
        super().__init__(**kwargs)


class DreamConfig(_CheckpointConfig):
    """config.json of Dream, DiffuCoder and Dream-Coder: Qwen2's keys."""

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
        super().__init__(**kwargs)


class UnservedConfig(PretrainedConfig):
    """In place of the configuration of a model that is known and not served."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            ValueError: always; says what the model is and what serves it.
        """
        model = unserved_model(config_dict.get("architectures") or (), cls.model_type)
        assert model is not None
        raise ValueError(model.refusal)


UNSERVED_CONFIGS: Final[Mapping[str, type[PretrainedConfig]]] = {
    model_type: type("UnservedConfig", (UnservedConfig,), {"model_type": model_type})
    for model in UNSERVED
    for model_type in model.model_types
}
"""By `model_type`."""

_CLASSES: Final[Mapping[str, type[_CheckpointConfig]]] = {
    kind.__name__: kind for kind in (LLaDAConfig, DreamConfig)
}

CONFIGS: Final[Mapping[str, type[PretrainedConfig]]] = {
    kind.model_type: kind for kind in _CLASSES.values()
}
"""By `model_type`; config.json of another architecture of the same type is read by its own."""


def _class_of(config_dict: dict[str, Any], asked: type[Any]) -> type[Any]:
    architectures = config_dict.get("architectures") or ()
    if not architectures:
        return asked
    for architecture in architectures:
        if architecture in MODELS:
            return _CLASSES[MODELS[architecture].config_class]
    model = unserved_model(architectures, None)
    if model is not None:
        raise ValueError(model.refusal)
    raise ValueError(
        f"The architecture {', '.join(architectures)} of model_type {asked.model_type!r} is not "
        f"served by vllm_sparsed; of this type these are: {served_architectures(asked.model_type)}."
    )
