"""`--quantization fp8` on a GPU: quantized where rows are made, against vLLM's separate passes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, SamplingParams

from tests.engine.golden_cases import MODELS
from tests.engine.golden_engine import start_golden
from tests.engine.inspection import runner_of
from vllm_sparsed.models import layers
from vllm_sparsed.models.fp8_rows import Fp8RowsProduct, takes_fp8_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(params=MODELS)
def quantized(request: pytest.FixtureRequest) -> Iterator[LLM]:
    llm = start_golden(request.param, dtype="bfloat16", quantization="fp8")
    yield llm
    llm.llm_engine.engine_core.shutdown()


def projections(block: Any) -> list[Any]:
    attention, mlp = block.self_attn, block.mlp
    return [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]


def tokens_of(llm: LLM) -> list[list[int]]:
    parameters = SamplingParams(
        temperature=0.0, seed=0, max_tokens=48, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": list(range(20, 40 + 9 * i))} for i in range(6)]
    outputs = llm.generate(prompts, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_blocks_of_a_served_model(quantized: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block's feed-forward layer is near vLLM's separate quantization of the same rows."""
    runner = runner_of(quantized)
    blocks = runner.model.model.layers
    kernels = {type(layer.quant_method.fp8_linear) for b in blocks for layer in projections(b)}
    assert kernels == {Fp8RowsProduct}
    assert all(takes_fp8_rows(layer) for block in blocks for layer in projections(block))
    generator = torch.Generator("cuda").manual_seed(0)
    size = blocks[0].input_layernorm.weight.shape[0]
    rows = torch.randn(65, size, device="cuda", generator=generator, dtype=torch.bfloat16)

    def feed_forward(block: Any) -> Tensor:
        residual = rows.clone()
        hidden, residual = layers.add_and_norm(
            block.post_attention_layernorm, rows.clone(), residual, block.mlp.gate_up_proj
        )
        assert torch.equal(residual, rows + rows)
        result: Tensor = block.mlp(hidden, residual)
        return result

    with torch.inference_mode():
        fused = [feed_forward(block) for block in blocks]
        monkeypatch.setattr(layers, "takes_fp8_rows", lambda layer: False)
        separate = [feed_forward(block) for block in blocks]
    for ours, theirs in zip(fused, separate, strict=True):
        # Two roundings to three bits of independent values are 0.04 apart.
        assert (ours - theirs).norm() < 0.04 * theirs.norm()


def test_tokens_repeat_and_survive_reloaded_weights(quantized: LLM) -> None:
    before = tokens_of(quantized)
    assert all(len(tokens) == 48 for tokens in before)
    assert tokens_of(quantized) == before
    quantized.collective_rpc("reload_weights")
    assert tokens_of(quantized) == before
