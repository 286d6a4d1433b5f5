"""Golden cases of deciding several tokens a pass without a cache."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import SamplingParams

FOLDER = Path(__file__).parent / "parallel"
MODELS = ("llada-mha", "dream-gqa")
_VALUES = {
    "threshold": "threshold",
    "factor": "factor",
    "entropy_bound": "gamma",
    "entropy_threshold": "threshold",
}


@dataclass(frozen=True)
class ParallelCase:
    """One case; `history`: per pass the [canvas position, token] that it decided."""

    model: str
    index: int
    prompt: list[int]
    canvas: int
    extra_args: dict[str, Any]
    expected: list[int]
    history: list[list[list[int]]]

    @property
    def name(self) -> str:
        pace = next(key for key in self.extra_args if key.removeprefix("diffusion_") in _VALUES)
        return f"{self.model}-{self.index}-{pace.removeprefix('diffusion_')}"

    def sampling_params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.canvas,
            ignore_eos=True,
            detokenize=False,
            extra_args=self.extra_args,
            **changes,
        )


def parallel_cases(model: str) -> list[ParallelCase]:
    """The cases of a model in which every pass is over the whole sequence.

    Of those of the released code with `factor`, the ones where it takes no last rank that fails.
    """
    cases = []
    for index, case in enumerate(json.loads((FOLDER / f"{model}.json").read_text())):
        params = case["params"]
        if params["cache"] != "none":
            continue
        if case["source"] == "fast-dllm" and case.get("last_rank", 0) > 0:
            continue
        alg = params["alg"]
        cases.append(
            ParallelCase(
                model=model,
                index=index,
                prompt=case["prompt_token_ids"],
                canvas=params["gen"],
                extra_args={
                    f"diffusion_{alg}": params[_VALUES[alg]],
                    "diffusion_block_length": params["block"],
                    "diffusion_alg": "low_confidence" if model == "llada-mha" else "maskgit_plus",
                    "sparsed_enabled": 0,
                },
                expected=case["output_token_ids"],
                history=[entry["decided"] for entry in case["history"]],
            )
        )
        assert case["passes"] == {"full": len(case["history"]), "partial": 0}
    return cases
