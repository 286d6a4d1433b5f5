"""The configurations present vLLM's names, follow overrides, and refuse what is not implemented."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config

from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.checkpoint_config import DreamConfig, LLaDAConfig
from vllm_sparsed.models.rotary import Rotary
from vllm_sparsed.models.rotary_parameters import SCALINGS
from vllm_sparsed.plugin import register

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> None:
    register()


def model_config(model: str, **overrides: Any) -> ModelConfig:
    return ModelConfig(
        str(GOLDEN / model), skip_tokenizer_init=True, dtype="float32", hf_overrides=overrides
    )


def golden_config(model: str, **changes: Any) -> LLaDAConfig | DreamConfig:
    values = json.loads((GOLDEN / model / "config.json").read_text())
    kind = LLaDAConfig if model == "llada-mha" else DreamConfig
    return kind(**{**values, **changes})


@pytest.mark.parametrize(
    ("model", "heads", "kv_heads", "hidden"),
    [("llada-mha", 16, 16, 256), ("dream-gqa", 8, 2, 128)],
    ids=["llada", "dream"],
)
def test_vllm_sees_the_dimensions(model: str, heads: int, kv_heads: int, hidden: int) -> None:
    config = model_config(model)
    architecture = config.model_arch_config
    assert architecture.total_num_attention_heads == heads
    assert config.get_total_num_kv_heads() == kv_heads
    assert config.get_head_size() == 16
    assert config.get_hidden_size() == hidden
    assert config.get_total_num_hidden_layers() == 2
    assert config.get_vocab_size() == 384
    assert config.max_model_len == 2048
    assert (config.runner_type, config.convert_type) == ("generate", "none")
    assert not config.is_attention_free
    assert not config.is_diffusion
    assert (config.hf_config.mask_token_id, config.hf_config.eos_token_id) == (383, 2)
    assert config.hf_config.intermediate_size == 2 * hidden
    check_supported(config.hf_config)


def test_llada_vocabulary_is_the_embedding_and_kv_heads_default_to_heads() -> None:
    config = LLaDAConfig(vocab_size=50257, embedding_size=50304, n_heads=8, d_model=64)
    assert config.vocab_size == 50304
    assert config.num_key_value_heads == 8
    assert config.intermediate_size == 256


@pytest.mark.parametrize(
    ("overrides", "expected", "max_model_len"),
    [
        ({"rope_theta": 2e6}, {"rope_type": "default", "rope_theta": 2e6}, 2048),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
            8192,
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 1e4},
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            4096,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 2048,
                },
                "max_position_embeddings": 8192,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
                "rope_theta": 5e5,
            },
            8192,
        ),
        (
            {"rope_parameters": {"rope_theta": 7.0}},
            {"rope_type": "default", "rope_theta": 7.0},
            2048,
        ),
    ],
    ids=["theta", "linear-legacy-name", "dynamic-and-theta", "yarn", "parameters"],
)
def test_rotary_overrides(
    overrides: dict[str, Any], expected: dict[str, Any], max_model_len: int
) -> None:
    config = model_config("llada-mha", **overrides)
    assert config.hf_config.rope_parameters == expected
    assert config.max_model_len == max_model_len
    check_supported(config.hf_config)
    # Worker processes get the configuration pickled.
    assert pickle.loads(pickle.dumps(config.hf_config)).rope_parameters == expected


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("activation_type", "gelu", "'silu'"),
        ("alibi", True, "False"),
        ("attention_layer_norm", True, "False"),
        ("bias_for_layer_norm", True, "False"),
        ("block_group_size", 2, "1"),
        ("block_type", "sequential", "'llama'"),
        ("clip_qkv", 8.0, "None"),
        ("include_bias", True, "False"),
        ("input_emb_norm", True, "False"),
        ("layer_norm_type", "default", "'rms'"),
        ("layer_norm_with_affine", False, "True"),
        ("multi_query_attention", True, "False"),
        ("rope", False, "True"),
        ("scale_logits", True, "False"),
        ("sliding_window", 512, "None"),
    ],
)
def test_llada_refuses(key: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"LLaDAModelLM: {key}={value!r}.*must be {allowed}"):
        check_supported(golden_config("llada-mha", **{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*must be 'silu'"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "num_attention_heads=8 must be a multiple of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_dream_refuses(changes: dict[str, Any], message: str) -> None:
    config = golden_config("dream-gqa")
    # As overrides: what config.json says has been validated by transformers already.
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=f"DreamModel: .*{message}"):
        check_supported(config)


def test_unused_sliding_window_is_ignored() -> None:
    config = golden_config("dream-gqa", use_sliding_window=False, sliding_window=64)
    check_supported(config)
    assert config.sliding_window is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type='longrope' is not supported.*one of default"),
        ({"type": "su", "short_factor": [1.0]}, "rope_type='su' is not supported"),
        ({"rope_type": ["linear"]}, r"rope_type=\['linear'\] is not supported"),
        ({"rope_type": "linear"}, "rope_type='linear' need factor"),
        ({"rope_type": "linear", "factor": None}, "rope_type='linear' need factor"),
        ({"rope_type": "linear", "factor": "8"}, "factor='8'.*must be a number above 0"),
        ({"rope_type": "linear", "factor": True}, "factor=True.*must be a number above 0"),
        ({"rope_type": "linear", "factor": 0.5}, "factor=0.5.*must be at least 1"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor=nan.*must be a number above 0"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 3.0}, "may not have alpha=3.0"),
        ({"rope_type": "default", "factor": 4.0}, "'default' may not have factor=4.0"),
        ({"rope_type": "default", "mrope_section": [1]}, "may not have mrope_section"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "may not have part"),
        ({"rope_type": "yarn", "factor": 2.0}, "need original_max_position_embeddings"),
        ({"rope_theta": 0}, "rope_theta=0 of rope_parameters must be a number above 0"),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            },
            "low_freq_factor of rope_parameters must be below",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["config.json", "override"])
def test_rotary_scalings_are_refused_by_name(
    place: str, parameters: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = json.loads((GOLDEN / "llada-mha" / "config.json").read_text())
    overrides = {"rope_parameters": parameters} if place == "override" else {}
    if place == "config.json":
        values["rope_scaling"] = parameters
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        ModelConfig(
            str(tmp_path), skip_tokenizer_init=True, dtype="float32", hf_overrides=overrides
        )


DOCUMENTED = re.findall(
    r"--max-model-len (\d+) --hf-overrides '(.*?)'",
    (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(),
)


def test_every_scaling_is_documented() -> None:
    types = {json.loads(text).get("rope_parameters", {}).get("rope_type") for _, text in DOCUMENTED}
    assert types == {None, *SCALINGS.keys() - {"default"}}


@pytest.mark.parametrize(("length", "overrides"), DOCUMENTED)
@pytest.mark.parametrize("integers", [False, True])
def test_documented_lines_extend_the_context(
    length: str, overrides: str, integers: bool, tmp_path: Path
) -> None:
    """As published, with the line's length and without a length."""
    if integers:
        overrides = overrides.replace("8.0", "8")
    values = json.loads((GOLDEN / "llada-mha" / "config.json").read_text())
    published = {**values, "max_sequence_length": 4096, "rope_theta": 500000.0}
    (tmp_path / "config.json").write_text(json.dumps(published))
    for max_model_len in (int(length), None):
        config = ModelConfig(
            str(tmp_path),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_model_len,
            hf_overrides=json.loads(overrides),
        )
        assert config.max_model_len == int(length)
        check_supported(config.hf_config)
        with set_current_vllm_config(VllmConfig()):
            table = Rotary(config.hf_config, config.max_model_len).rope.cos_sin_cache
        assert len(table) >= int(length)
        assert table.isfinite().all()
