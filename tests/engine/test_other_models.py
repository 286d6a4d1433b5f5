"""An ordinary model runs in the same installation exactly as without the plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", max_model_len=128,
          enforce_eager=True, max_num_seqs=4, kv_cache_memory_bytes=2**26, seed=0)
config = llm.llm_engine.vllm_config
core = llm.llm_engine.engine_core.engine_core
prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (2, 17, 40)]
params = [
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False),
    SamplingParams(temperature=0.8, seed=3, max_tokens=20, ignore_eos=True, detokenize=False),
    SamplingParams(max_tokens=20, logprobs=2, seed=4, detokenize=False),
]
outputs = llm.generate(prompts, params, use_tqdm=False)
worker = core.model_executor.driver_worker.worker
print("RESULT " + json.dumps({
    "worker_cls": config.parallel_config.worker_cls,
    "worker": str(type(worker)),
    "runner": str(type(worker.model_runner)),
    "scheduler_cls": str(config.scheduler_config.scheduler_cls),
    "scheduler": str(type(core.scheduler)),
    "async_scheduling": config.scheduler_config.async_scheduling,
    "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
    "prefix_caching": config.cache_config.enable_prefix_caching,
    "batched_tokens": config.scheduler_config.max_num_batched_tokens,
    "compilation": str(config.compilation_config.mode),
    "logits_processors": config.model_config.logits_processors,
    "additional_config": config.additional_config,
    "generation_defaults": config.model_config.get_diff_sampling_param(),
    "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    "plugin": sorted(name for name in sys.modules if name.split(".")[0] == "vllm_sparsed")[:1],
}))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(model: Path, **environment: str) -> dict[str, Any]:
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        **environment,
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model)], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return answer


def test_llama_is_the_same_with_and_without_the_plugin(llama: Path) -> None:
    present = run(llama)
    absent = run(llama, VLLM_PLUGINS="")
    assert present.pop("plugin") == ["vllm_sparsed"]
    assert absent.pop("plugin") == []
    assert [len(tokens) for tokens in absent["tokens"][:2]] == [20, 20]
    assert present == absent
