"""iLLaDA and LLaDA-MoE compute what plain PyTorch does, on random weights in the public layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from vllm.transformers_utils.chat_templates import get_chat_template_fallback_path

from tests.models.checkpoints import (
    ILLADA,
    LLADA_MOE,
    fuse_experts,
    random_weights,
    reference,
    write_checkpoint,
)
from tests.models.loading import LoadedModel
from tests.models.test_forward import assert_as_exact_as_pytorch, sequences
from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.checkpoint_config import ILLaDAConfig, LLaDAMoEConfig

pytestmark = pytest.mark.usefixtures("parallel_groups")

CONFIGS = pytest.mark.parametrize(
    "config", [ILLADA, LLADA_MOE], ids=lambda config: config["architectures"][0]
)
FUSED = pytest.mark.parametrize(
    "names", [("w1", "w2"), ("experts.gate_up_proj", "experts.down_proj")], ids=["dinfer", "vllm"]
)


@CONFIGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits(config: Mapping[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config)
    loaded = LoadedModel(folder, dtype=str(dtype).removeprefix("torch."))
    assert loaded.model.logit_shift is False
    if dtype == torch.float32:
        for tokens, logits in zip(sequences(), loaded.logits(sequences()), strict=True):
            expected = reference(folder, torch.float32).logits(tokens)[0]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    if dtype == torch.float32 or config is ILLADA:
        assert_as_exact_as_pytorch(folder, loaded, dtype)
        return
    # Rounding chooses other experts at some positions, wherever two are nearly as good: the largest
    # error is a matter of chance.
    exact, plain = (
        torch.cat([reference(folder, kind).logits(tokens)[0] for tokens in sequences()])
        for kind in (torch.float64, dtype)
    )
    errors = [(logits - exact).abs() for logits in (torch.cat(loaded.logits(sequences())), plain)]
    ours, usual = (
        error.amax(dim=-1).quantile(torch.tensor([0.25, 0.5, 0.75]).double()) for error in errors
    )
    assert (ours <= 2 * usual).all()
    assert errors[0].mean() <= 2 * errors[1].mean()


@FUSED
@pytest.mark.parametrize("architecture", ["LLaDAMoEModelLM", "FusedLLaDAMoEModelLM"])
def test_fused_experts_are_the_same(
    names: tuple[str, str], architecture: str, tmp_path: Path
) -> None:
    apart = write_checkpoint(tmp_path / "apart", LLADA_MOE)
    weights = fuse_experts(random_weights(LLADA_MOE), LLADA_MOE, *names)
    assert not any(".0.up_proj" in name for name in weights)
    fused = write_checkpoint(
        tmp_path / "fused", {**LLADA_MOE, "architectures": [architecture]}, weights
    )
    expected = LoadedModel(apart).logits(sequences())
    for logits, other in zip(LoadedModel(fused).logits(sequences()), expected, strict=True):
        assert logits.equal(other)


@pytest.mark.parametrize(
    "tensor",
    [
        "mlp.experts.3.gate_proj",
        "mlp.experts.15.up_proj",
        "mlp.experts.0.down_proj",
        "mlp.gate",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "self_attn.v_proj",
    ],
)
def test_missing_tensors_of_llada_moe(tensor: str, tmp_path: Path) -> None:
    weights = random_weights(LLADA_MOE)
    name = f"model.layers.1.{tensor}.weight"
    del weights[name]
    folder = write_checkpoint(tmp_path, LLADA_MOE, weights)
    with pytest.raises(ValueError, match=f"lack 1 tensors that config.json asks for: {name}"):
        LoadedModel(folder)


@FUSED
@pytest.mark.parametrize("which", [0, 1], ids=["gate-and-up", "down"])
def test_missing_fused_tensors(names: tuple[str, str], which: int, tmp_path: Path) -> None:
    weights = fuse_experts(random_weights(LLADA_MOE), LLADA_MOE, *names)
    del weights[f"model.layers.1.mlp.{names[which]}"]
    folder = write_checkpoint(tmp_path, LLADA_MOE, weights)
    with pytest.raises(ValueError, match=f"lack {(32, 16)[which]} tensors .*layers.1.mlp.experts"):
        LoadedModel(folder)


def test_biases_that_config_json_does_not_ask_for(tmp_path: Path) -> None:
    """Such as those of iLLaDA's class with LayerNorm; zeros, as quantizers add, change nothing."""
    name = "model.layers.0.input_layernorm.bias"
    zeros = random_weights(ILLADA) | {name: torch.zeros(128)}
    LoadedModel(write_checkpoint(tmp_path / "zeros", ILLADA, zeros))
    ones = random_weights(ILLADA) | {name: torch.ones(128)}
    with pytest.raises(ValueError, match=f"have {name}, which config.json does not ask for"):
        LoadedModel(write_checkpoint(tmp_path / "ones", ILLADA, ones))


def test_epsilon_has_one_of_two_names(tmp_path: Path) -> None:
    config = {**ILLADA, "layer_norm_eps": 1e-3, "rms_norm_eps": None}
    folder = write_checkpoint(tmp_path, config)
    assert_as_exact_as_pytorch(folder, LoadedModel(folder), torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ILLaDAConfig, {"attention_bias": True}, "attention_bias=True"),
        (ILLaDAConfig, {"mlp_bias": True}, "mlp_bias=True"),
        (ILLaDAConfig, {"rms_norm_eps": None}, "must have rms_norm_eps or layer_norm_eps"),
        (LLaDAMoEConfig, {"qk_layernorm": False}, "qk_layernorm=False"),
        (LLaDAMoEConfig, {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (LLaDAMoEConfig, {"moe_router_score_function": "sigmoid"}, "='sigmoid'"),
        (LLaDAMoEConfig, {"moe_router_enable_expert_bias": True}, "enable_expert_bias=True"),
        (LLaDAMoEConfig, {"moe_layer_freq": [0, 1]}, r"moe_layer_freq=\[0, 1\]"),
        (LLaDAMoEConfig, {"num_shared_experts": 1}, "num_shared_experts=1 .* LLaDA-MoE-v2"),
        (LLaDAMoEConfig, {"shared_expert_intermediate_size": 512}, "=512 .* LLaDA-MoE-v2"),
        (LLaDAMoEConfig, {"num_experts_per_tok": 17}, "num_experts_per_tok=17 must be from 1 to"),
        (LLaDAMoEConfig, {"head_dim": 32}, "head_dim=32 must be hidden_size"),
    ],
    ids=str,
)
def test_refused_configurations(kind: Any, changes: dict[str, Any], message: str) -> None:
    values = ILLADA if kind is ILLaDAConfig else LLADA_MOE
    check_supported(kind(**values))
    with pytest.raises(ValueError, match=message):
        check_supported(kind(**{**values, **changes}))


def test_chat_template_of_checkpoints_without_one() -> None:
    path = get_chat_template_fallback_path("lladamoe", "any")
    assert path is not None
    assert get_chat_template_fallback_path("llada", "any") is None
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
        {"role": "user", "content": " So?\n"},
    ]
    text = jinja2.Template(path.read_text()).render(messages=messages, add_generation_prompt=True)
    assert text == (
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Why?<|role_end|>"
        "<role>ASSISTANT</role>Because.<|role_end|><role>HUMAN</role> So?\n<|role_end|>"
        "<role>ASSISTANT</role>"
    )
