"""The plain loops with stored keys and values give the golden tokens and histories."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.reuse import Pace, Pass, Reuse, generate_with_reuse
from benchmarks.reference.sparse_pattern import SparseSettings

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
VALUES = {
    "threshold": "threshold",
    "factor": "factor",
    "entropy_bound": "gamma",
    "entropy_threshold": "threshold",
}


def cases(folder: str) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        f"{model}-{index}": (model, case)
        for model in ("llada-mha", "dream-gqa")
        for index, case in enumerate(json.loads((GOLDEN / folder / f"{model}.json").read_text()))
    }


PARALLEL, WINDOW = cases("parallel"), cases("window")


@cache
def load(model: str, dtype: torch.dtype) -> ReferenceModel:
    return ReferenceModel.load(GOLDEN / model, dtype)


def run(model: str, case: dict[str, Any], reuse: Reuse, dtype: torch.dtype) -> list[Pass]:
    params = case["params"]
    alg = params["alg"]
    pace = Pace(
        alg,
        params[VALUES[alg]] if alg in VALUES else None,
        params.get("steps", 0),
        last_rank=case.get("source") == "fast-dllm",
    )
    sparsed = params.get("sparsed")
    return generate_with_reuse(
        load(model, dtype),
        torch.tensor(case["prompt_token_ids"]),
        params["gen"],
        params["block"],
        pace,
        reuse,
        SparseSettings(**sparsed) if sparsed else None,
    )


def history(passes: list[Pass], prompt_len: int, attention: bool) -> list[dict[str, Any]]:
    """In the form of the golden data."""
    return [
        {
            "rows": "full" if one.rows is None else [row - prompt_len for row in one.rows],
            **({"attention": one.attention} if attention else {}),
            "decided": [[position - prompt_len, token] for position, token in one.decided],
        }
        for one in passes
    ]


@pytest.mark.parametrize("name", PARALLEL)
def test_fast_dllm(name: str) -> None:
    model, case = PARALLEL[name]
    passes = run(model, case, Reuse(case["params"]["cache"]), torch.float32)
    assert history(passes, len(case["prompt_token_ids"]), attention=False) == case["history"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in WINDOW]
    + [(name, torch.float64) for name in list(WINDOW)[::6]],
)
def test_window(name: str, dtype: torch.dtype) -> None:
    model, case = WINDOW[name]
    params = case["params"]
    reuse = Reuse(
        "window",
        params["warmup"],
        params["refresh_tokens"],
        params.get("refresh_passes"),
        params["margin"],
    )
    passes = run(model, case, reuse, dtype)
    assert history(passes, len(case["prompt_token_ids"]), attention=True) == case["history"]
