"""The plain PyTorch models and loops reproduce what the released SparseD code generated."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference.generate import (
    Request,
    Step,
    generate_dream,
    generate_llada,
    output_tokens,
)
from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSequence, SparseSettings

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = {
    f"{model}-{index}": (model, case)
    for model in ("llada-mha", "dream-gqa")
    for index, case in enumerate(json.loads((GOLDEN / model / "expected.json").read_text()))
}


@cache
def load(model: str, dtype: torch.dtype) -> ReferenceModel:
    return ReferenceModel.load(GOLDEN / model, dtype)


def generate(
    model: ReferenceModel, case: dict[str, Any], **options: Any
) -> tuple[list[int], list[Step], SparseSequence]:
    params = case["params"]
    sparsed = params.get("sparsed")
    sequence = SparseSequence(
        model, params["gen"], params["steps"], SparseSettings(**sparsed) if sparsed else None
    )
    request = Request(
        new_sequence=lambda: sequence,
        prompt=torch.tensor(case["prompt_token_ids"]),
        canvas_len=params["gen"],
        mask_token_id=model.dimensions.mask_token_id,
        logit_shift=model.dimensions.logit_shift,
    )
    if "block" in params:
        steps = generate_llada(
            request, steps=params["steps"], block_length=params["block"], **options
        )
    else:
        steps = generate_dream(request, steps=params["steps"], alg=params["alg"])
    return output_tokens(request, steps), steps, sequence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_tokens_and_patterns(name: str, dtype: torch.dtype) -> None:
    model, case = CASES[name]
    tokens, _, sequence = generate(load(model, dtype), case)
    if dtype == torch.float32 or case["same_in_float64"]:
        assert tokens == case["output_token_ids"]
    if dtype == torch.float32 and "sparsed" in case["params"]:
        expected = load_file(GOLDEN / "block_masks.safetensors")[case["block_mask"]]
        assert sequence.patterns is not None
        assert torch.equal(torch.stack(sequence.patterns), expected.bool())
        density = torch.stack(sequence.patterns).double().mean().item()
        assert case["mask_density"] == pytest.approx(density, abs=5e-5)
