"""iLLaDA and LLaDA-MoE over HTTP, on two ranks: the tokens of the plain loops, in every mode."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.reuse import Pace, Reuse, generate_with_reuse
from benchmarks.reference.sparse_pattern import SparseSettings
from tests.engine.http_server import MODEL_NAME, Server, add_tokenizer, serve
from tests.models.checkpoints import ILLADA, LLADA_MOE, write_checkpoint

CANVAS, BLOCK, STEPS = 64, 32, 32
PROMPT = [10 + (7 * i) % 300 for i in range(70)]
SPARSE = SparseSettings(skip=0.2, select=0.5, block_size=16)
WINDOW = Reuse("window", warmup_passes=1, refresh_tokens=8, margin=16)

# The request's parameters, and what the plain loop is told.
MODES: dict[str, tuple[dict[str, Any], Pace, Reuse, SparseSettings | None]] = {
    "dense": (
        {"diffusion_steps": STEPS, "sparsed_enabled": 0},
        Pace("low_confidence", steps=STEPS),
        Reuse("none"),
        None,
    ),
    "sparse": (
        {"diffusion_steps": STEPS, "sparsed_skip": 0.2, "sparsed_select": 0.5},
        Pace("low_confidence", steps=STEPS),
        Reuse("none"),
        SPARSE,
    ),
    "fewer passes": (
        {"diffusion_threshold": 0.02, "sparsed_enabled": 0},
        Pace("threshold", 0.02),
        Reuse("none"),
        None,
    ),
    "reuse": (
        {"diffusion_steps": STEPS, "diffusion_kv_reuse": "dual", "sparsed_enabled": 0},
        Pace("low_confidence", steps=STEPS),
        Reuse("dual"),
        None,
    ),
    "reuse of a window": (
        {
            "diffusion_steps": STEPS,
            "diffusion_kv_reuse": "window",
            "diffusion_refresh_tokens": 8,
            "diffusion_window_margin": 16,
            "sparsed_enabled": 0,
        },
        Pace("low_confidence", steps=STEPS),
        WINDOW,
        None,
    ),
}


@pytest.fixture(scope="module", params=["illada", "llada-moe"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Server, ReferenceModel]]:
    """A server on two ranks; of LLaDA-MoE each has half of the experts."""
    folder = tmp_path_factory.mktemp(request.param)
    is_moe = request.param == "llada-moe"
    model = write_checkpoint(folder / "model", LLADA_MOE if is_moe else ILLADA)
    add_tokenizer(model, with_template=not is_moe)
    options = ["--tensor-parallel-size", "2", *(["--enable-expert-parallel"] * is_moe)]
    with serve(model, folder / "log", *options) as server:
        yield request.param, server, ReferenceModel.load(model, torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_plain_loop(
    served: tuple[str, Server, ReferenceModel], mode: str
) -> None:
    _, server, model = served
    extra, pace, reuse, sparse = MODES[mode]
    passes = generate_with_reuse(model, torch.tensor(PROMPT), CANVAS, BLOCK, pace, reuse, sparse)
    decided = {position: token for one in passes for position, token in one.decided}
    body = {
        "model": MODEL_NAME,
        "prompt": PROMPT,
        "max_tokens": CANVAS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"diffusion_block_length": BLOCK, **extra},
    }
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    tokens = response.json()["choices"][0]["token_ids"]
    assert tokens == [decided[len(PROMPT) + index] for index in range(CANVAS)]


def test_chat(served: tuple[str, Server, ReferenceModel]) -> None:
    """LLaDA-MoE's tokenizer has no template here: the package's is used."""
    name, server, _ = served
    messages = [{"role": "user", "content": "w20 w21"}]
    body = {"model": MODEL_NAME, "messages": messages, "max_tokens": 32}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    text = "w10 w20 w21 w11 w12 "
    if name == "llada-moe":
        text = "<role>HUMAN</role>w20 w21<|role_end|><role>ASSISTANT</role>"
    as_chat, as_text = (
        server.post("/tokenize", {"model": MODEL_NAME, **what}).json()["tokens"]
        for what in ({"messages": messages}, {"prompt": text})
    )
    assert as_chat == as_text
