"""vLLM's options of the store of keys and values, and what a server says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from tests.engine.golden_cases import GOLDEN, load_cases
from tests.engine.golden_engine import start_golden
from tests.engine.inspection import runner_of
from tests.engine.reuse_cases import load_reuse_cases
from vllm_sparsed.attention.pages import NO_SLOT, PAGE_SIZE, page_slots, split_pages, store_rows
from vllm_sparsed.config.kv_pages import _other_bytes, sequence_bytes
from vllm_sparsed.config.settings import KV_PAGES_KEY, keeps_pages


def test_fp8_pages_of_a_given_number() -> None:
    """Half the memory; refreshes read nothing of it, so a refresh for every token is exact."""
    llm = start_golden("llada-mha", kv_cache_dtype="fp8", num_gpu_blocks_override=12)
    try:
        pages = runner_of(llm).kv_caches
        heads, head_size = 16, 16
        assert {(x.dtype, tuple(x.shape)) for x in pages} == {
            (torch.uint8, (12, heads, PAGE_SIZE, 2 * head_size))
        }
        assert not pages[0].any()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        usage = []
        for case in load_cases("llada-mha")[:2]:
            params = case.sampling_params()
            params.extra_args |= {"diffusion_kv_reuse": "window", "diffusion_refresh_tokens": 1}
            llm.llm_engine.add_request("one", {"prompt_token_ids": case.prompt}, params)
            while llm.llm_engine.has_unfinished_requests():
                (tokens,) = [x.outputs[0].token_ids for x in llm.llm_engine.step()] or [()]
                usage.append(scheduler.kv_cache_manager.usage)
            assert list(tokens) == case.expected
        assert max(usage) > 0 and usage[-1] == 0
        assert pages[0].any(), "refreshes have stored"
        case = load_reuse_cases("llada-mha")[-1]
        outputs = llm.generate(
            [{"prompt_token_ids": case.prompt}], case.sampling_params(), use_tqdm=False
        )
        assert len(outputs[0].outputs[0].token_ids) == case.params["gen"]
    finally:
        llm.llm_engine.engine_core.shutdown()


def configure(**options: Any) -> Any:
    usual: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 640,
        "attention_backend": "sparsed",
    }
    usual["model"] = str(GOLDEN / "llada-mha")
    return EngineArgs(**(usual | options)).create_engine_config()


@pytest.mark.parametrize(
    ("options", "keeps"),
    [
        ({}, True),
        ({"additional_config": {"diffusion": {"kv_reuse_pages": False}}}, False),
        ({"additional_config": {"diffusion": {"kv_reuse": "dual"}}}, True),
        ({"attention_backend": None}, False),
    ],
    ids=json.dumps,
)
def test_who_keeps_pages(options: dict[str, Any], keeps: bool) -> None:
    config = configure(**options)
    assert keeps_pages(config) is keeps
    assert config.additional_config[KV_PAGES_KEY] is keeps
    assert config.cache_config.kv_cache_memory_bytes == 0


def test_too_large_a_share_of_the_memory_is_taken_only_where_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed = sequence_bytes(configure())
    # Two layers, keys and values of 16 heads of 16 in float32.
    assert needed == 640 * 2 * 2 * 16 * 16 * 4
    for memory, keeps in ((2 * needed, False), (2 * needed + 1, True)):
        monkeypatch.setattr("vllm_sparsed.config.kv_pages._memory_bytes", lambda _, m=memory: m)
        assert keeps_pages(configure()) is keeps
        asked = {"diffusion": {"kv_reuse_pages": True}}
        assert keeps_pages(configure(additional_config=asked))
        assert keeps_pages(configure(kv_cache_dtype="fp8"))


def test_rows_are_stored_in_their_slots() -> None:
    assert page_slots([], 3, 5).tolist() == [NO_SLOT, NO_SLOT]
    slots = page_slots([7, 2], 126, 130)
    assert slots.tolist() == [7 * 128 + 126, 7 * 128 + 127, 2 * 128, 2 * 128 + 1]
    pages = torch.full((8, 2, PAGE_SIZE, 8), torch.nan)
    key, value = torch.randn(5, 2, 4), torch.randn(5, 2, 4)
    with_gap = torch.tensor([*slots.tolist(), NO_SLOT])
    layer = type("Layer", (), {"_k_scale": torch.ones(()), "_v_scale": torch.ones(())})
    store_rows(layer, key, value, pages, with_gap, "auto")
    keys, values = split_pages(pages, 4)
    assert torch.equal(keys[7, 126:], key[:2]) and torch.equal(keys[2, :2], key[2:4])
    assert torch.equal(values[7, 126:], value[:2]) and torch.equal(values[2, :2], value[2:4])
    assert pages.isnan().sum() == pages.numel() - 4 * 2 * 8, "nothing else is written"


def test_pages_beside_weights_and_batch_are_guessed_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLaDA-8B with 64k tokens on a card of 80 GB has room; not with four times the batch."""
    shape = Path(__file__).resolve().parents[2] / "benchmarks" / "shapes" / "llada-8b"
    for budget, least, most in ((65536, 20, 28), (262144, 40, 55)):
        config = configure(
            model=str(shape),
            dtype="bfloat16",
            max_model_len=65536,
            max_num_batched_tokens=budget,
            hf_overrides={"max_sequence_length": 65536},
        )
        assert sequence_bytes(config) == 32 * 2**30
        assert least < _other_bytes(config) / 2**30 < most
