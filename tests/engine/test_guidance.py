"""Guided requests: both sequences in one pass, or in turn where two do not fit."""

import random
from collections.abc import Callable

import pytest
from vllm import LLM, SamplingParams

from tests.engine.inspection import MAX_BATCH_TOKENS, MAX_MODEL_LEN, runner_of


def guided(length: int, sparse: int) -> tuple[list[int], SamplingParams]:
    rng = random.Random(length)
    params = SamplingParams(
        temperature=0.0,
        seed=1,  # Dream's default algorithm draws the order
        max_tokens=24,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "diffusion_steps": 12,
            "diffusion_cfg_scale": 1.5,
            "sparsed_enabled": sparse,
            "sparsed_select": 0.3,
        },
    )
    return [rng.randrange(3, 383) for _ in range(length - 24)], params


@pytest.mark.parametrize(
    ("length", "sparse"), [(330, 0), (330, 1), (600, 0)], ids=["dense", "sparse", "longest"]
)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_in_turn_as_in_one_pass(
    engine: Callable[..., LLM], model: str, length: int, sparse: int
) -> None:
    prompt, params = guided(length, sparse)
    tokens, passes = [], []
    for max_batch_tokens in (MAX_BATCH_TOKENS, MAX_MODEL_LEN):
        llm = engine(model, max_batch_tokens)
        runner = runner_of(llm)
        run_pass, sizes = runner.run_pass, []
        runner.run_pass = lambda batch, f=run_pass, s=sizes: s.append(batch.num_tokens) or f(batch)
        try:
            output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        finally:
            del runner.run_pass
        tokens.append(list(output.outputs[0].token_ids))
        passes.append(set(sizes))
    assert tokens[0] == tokens[1]
    assert passes == [{2 * length}, {length}]
    unguided = params.clone()
    assert unguided.extra_args is not None
    unguided.extra_args["diffusion_cfg_scale"] = 0.0
    output = engine(model).generate([{"prompt_token_ids": prompt}], unguided, use_tqdm=False)[0]
    assert list(output.outputs[0].token_ids) != tokens[0]


def test_in_turn_beside_other_requests(engine: Callable[..., LLM]) -> None:
    """An in-turn request shares its first pass with others, and neither changes the other."""
    llm = engine("llada-mha", MAX_MODEL_LEN)
    requests = [guided(400, 0), guided(100, 1), guided(60, 0)]
    alone = [
        list(llm.generate([{"prompt_token_ids": p}], s, use_tqdm=False)[0].outputs[0].token_ids)
        for p, s in requests
    ]
    together = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [params for _, params in requests],
        use_tqdm=False,
    )
    assert [list(output.outputs[0].token_ids) for output in together] == alone


def test_patterns_larger_than_the_store_stay_dense(engine: Callable[..., LLM]) -> None:
    llm = engine("llada-mha", MAX_MODEL_LEN)
    prompt, params = guided(600, 1)
    runner = runner_of(llm)
    assert runner.store is not None
    assert runner.store.size.num_rows < 2 * -(-600 // 16)
    dense = guided(600, 0)[1]
    outputs = llm.generate([{"prompt_token_ids": prompt}] * 2, [params, dense], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
