"""What cannot run is refused before an engine starts, with an error that names the option."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.envs import disable_envs_cache
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType

from tests.engine.golden_cases import GOLDEN
from vllm_sparsed.attention.backend import SparsedAttentionBackend
from vllm_sparsed.config.engine import SCHEDULER
from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.kernels.block_selection import MAX_BLOCKS


def create(model: Path = GOLDEN / "llada-mha", **options: Any) -> Any:
    arguments = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 640,
        "attention_backend": "sparsed",
        **options,
    }
    return EngineArgs(model=str(model), **arguments).create_engine_config()


REFUSED_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"enable_lora": True}, "--enable-lora"),
    (
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        "--pipeline-parallel-size|[Pp]ipeline parallel",
    ),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "--speculative-config",
    ),
    (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "--decode-context-parallel-size",
    ),
    ({"enable_dbo": True}, "--enable-dbo"),
    (
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    ({"runner": "pooling"}, "--runner"),
    ({"enable_sleep_mode": True}, "[Ss]leep mode|--enable-sleep-mode"),
    ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "--worker-cls"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype|kv.cache.dtype|fp8"),
    ({"kv_cache_dtype": "bfloat16"}, "--kv-cache-dtype bfloat16 .*auto, fp8, fp8_e4m3, float32"),
    (
        {
            "kv_cache_dtype": "fp8",
            "additional_config": {"diffusion": {"kv_reuse_pages": False}},
        },
        "--kv-cache-dtype fp8 is not supported .*there is no key/value cache",
    ),
    (
        {
            "attention_backend": None,
            "additional_config": {"diffusion": {"kv_reuse_pages": True}},
        },
        r"diffusion\.kv_reuse_pages=true needs --attention-backend sparsed",
    ),
    (
        {"attention_backend": None, "additional_config": {"diffusion": {"kv_reuse": "dual"}}},
        r"diffusion\.kv_reuse=dual needs --attention-backend sparsed",
    ),
    ({"logits_processors": ["a.module:Processor"]}, "--logits-processors"),
    ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
    ({"offload_backend": "uva"}, "--offload-backend"),
    ({"offload_group_size": 2}, "--offload-group-size"),
    ({"kv_offloading_size": 1}, "--kv-offloading-size"),
    ({"async_scheduling": True}, "--async-scheduling"),
    ({"diffusion_config": {"canvas_length": 32}}, "--diffusion-config"),
    ({"override_generation_config": {"max_new_tokens": -1}}, "--override-generation-config is -1"),
    ({"override_generation_config": {"max_new_tokens": 0}}, "--override-generation-config is 0"),
    ({"override_generation_config": {"max_new_tokens": 2.5}}, "--override-generation-config"),
    ({"override_generation_config": {"max_new_tokens": True}}, "--override-generation-config"),
    (
        {
            "data_parallel_size": 2,
            "additional_config": {"diffusion": {"show_canvas": True}},
        },
        "diffusion.show_canvas .* --data-parallel-size",
    ),
]

BAD_CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"sparsed": {"selects": 0.3}}, "sparsed.selects"),
    ({"sparsed": {"select": 2}}, "sparsed.select"),
    ({"sparsed": {"block_size": 48}}, "sparsed.block_size"),
    ({"sparsed": {"skip": 1}}, "sparsed.skip"),
    ({"sparsed": {"enabled": "maybe"}}, "sparsed.enabled"),
    ({"sparsed": {"max_canvas": 0}}, "sparsed.max_canvas"),
    ({"sparsed": 3}, "sparsed"),
    ({"diffusion": {"alg": "greedy"}}, "diffusion.alg"),
    ({"diffusion": {"steps": 0}}, "diffusion.steps"),
    ({"diffusion": {"default_canvas": "long"}}, "diffusion.default_canvas"),
    ({"diffusion": {"temperature": 1}}, "diffusion.temperature"),
    ({"diffusion": [1]}, "diffusion"),
]

UNSUPPORTED_CHECKPOINTS: list[tuple[str, dict[str, Any], str]] = [
    ("llada-mha", {"alibi": True}, "alibi"),
    ("llada-mha", {"activation_type": "gelu"}, "activation_type"),
    ("llada-mha", {"block_group_size": 2}, "block_group_size"),
    ("llada-mha", {"layer_norm_type": "low_precision"}, "layer_norm_type"),
    ("llada-mha", {"attention_layer_norm": True}, "attention_layer_norm"),
    ("llada-mha", {"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ("llada-mha", {"mask_token_id": 384}, "mask_token_id"),
    ("llada-mha", {"n_heads": 32, "n_kv_heads": 32}, "head size 8 .* one of 16, 32, 64"),
    ("dream-gqa", {"hidden_act": "gelu"}, "hidden_act"),
    ("dream-gqa", {"use_sliding_window": True}, "use_sliding_window"),
]


def named(cases: list[Any]) -> dict[str, Any]:
    return {"ids": [json.dumps(case[-2])[:50] for case in cases]}


def test_the_options_without_a_refused_one_are_good() -> None:
    config = create(additional_config={"sparsed": {"select": 0.5}, "other": 1})
    assert config.scheduler_config.scheduler_cls == SCHEDULER
    assert config.attention_config.backend.name == "SPARSED"


@pytest.mark.parametrize(("options", "message"), REFUSED_OPTIONS, **named(REFUSED_OPTIONS))
def test_refused_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        create(**options)


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine of another test in this process has vLLM remember its variables.
    disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND is not supported"):
        create()


class Lines(logging.Handler):
    """Messages of this package; vLLM's loggers do not pass theirs on to pytest's."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append((record.levelname, record.getMessage()))


@pytest.fixture
def lines() -> Iterator[list[tuple[str, str]]]:
    logger, handler = logging.getLogger("vllm.vllm_sparsed"), Lines()
    logger.addHandler(handler)
    yield handler.found
    logger.removeHandler(handler)


def test_what_has_no_effect_is_said(lines: list[tuple[str, str]]) -> None:
    without_pages = {"diffusion": {"kv_reuse_pages": False}}
    create(
        num_gpu_blocks_override=7,
        block_size=32,
        enable_prefix_caching=True,
        additional_config=without_pages,
    )
    for option in ("--num-gpu-blocks-override", "--block-size"):
        (level,) = (level for level, text in lines if text.startswith(f"{option} has no effect"))
        assert level == "WARNING"
    (line,) = (line for line in lines if line[1].startswith("Switched off"))
    assert line[0] == "INFO"
    assert "prefix caching, chunked prefill" in line[1]
    lines.clear()
    create(enable_prefix_caching=False, enable_chunked_prefill=False)
    assert not any("Switched off" in text or "no effect" in text for _, text in lines)


def test_refused_precision() -> None:
    with pytest.raises(ValueError, match=r"--dtype torch.float64; .* torch.bfloat16"):
        create(dtype=torch.float64)


@pytest.mark.parametrize(("section", "message"), BAD_CONFIGURATIONS, **named(BAD_CONFIGURATIONS))
def test_bad_additional_config(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(additional_config=section)


@pytest.mark.parametrize(
    ("model", "overrides", "message"), UNSUPPORTED_CHECKPOINTS, **named(UNSUPPORTED_CHECKPOINTS)
)
def test_unsupported_checkpoint(model: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(GOLDEN / model, hf_overrides=overrides)


BUDGETS = ("max_num_batched_tokens", "max_num_scheduled_tokens")


@pytest.mark.parametrize("given", [1, 128, 639])
@pytest.mark.parametrize("budget", BUDGETS)
def test_too_small_a_token_budget_is_raised(budget: str, given: int) -> None:
    options: dict[str, Any] = {budget: given}
    config = create(max_num_seqs=1, **options)
    assert getattr(config.scheduler_config, budget) == 640
    assert engine_settings(config).max_batch_tokens >= 640


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_large_token_budget_is_kept(budget: str) -> None:
    options: dict[str, Any] = {budget: 2**20}
    config = create(**options)
    assert getattr(config.scheduler_config, budget) == 2**20
    assert engine_settings(config).max_batch_tokens == 2**20


@pytest.mark.parametrize(
    ("max_model_len", "block_size", "remedy"),
    [
        (16 * MAX_BLOCKS + 1, 16, "of 32 or 64 or 128, or a --max-model-len of at most 131072"),
        (64 * MAX_BLOCKS + 1, 64, "of 128, or a --max-model-len of at most 524288"),
        (128 * MAX_BLOCKS + 1, 128, "possible: use a --max-model-len of at most 1048576"),
    ],
)
def test_more_blocks_than_a_pattern_can_have(
    max_model_len: int, block_size: int, remedy: str
) -> None:
    def start(length: int, **sparsed: Any) -> Any:
        return create(
            max_model_len=length,
            hf_overrides={"max_sequence_length": max_model_len},
            additional_config={"sparsed": {"block_size": block_size, **sparsed}},
        )

    with pytest.raises(ValueError, match=rf"sparsed.block_size={block_size} .*{remedy}\."):
        start(max_model_len)
    assert start(max_model_len - 1).model_config.max_model_len == MAX_BLOCKS * block_size
    assert start(max_model_len, enabled=False).model_config.max_model_len == max_model_len


@pytest.mark.parametrize(
    ("attn_type", "reasons"),
    [(AttentionType.DECODER, 1), (AttentionType.ENCODER_ONLY, 0)],
    ids=["causal", "bidirectional"],
)
def test_backend_validates_the_attention_type(attn_type: str, reasons: int) -> None:
    """What makes vLLM refuse `--attention-backend sparsed` for a causal model on CUDA.

    Its CPU platform ignores the name of the backend and asks nobody.
    """
    refusals = SparsedAttentionBackend.validate_configuration(
        head_size=128,
        dtype=torch.bfloat16,
        kv_cache_dtype="auto",
        block_size=None,
        use_mla=False,
        has_sink=False,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=DeviceCapability(9, 0),
        attn_type=attn_type,
    )
    assert len(refusals) == reasons, refusals
