"""The golden cases: what the released SparseD code generates from two small checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm import SamplingParams

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = ("llada-mha", "dream-gqa")


@dataclass(frozen=True)
class GoldenCase:
    """One case of expected.json.

    Attributes:
        block_mask: key in block_masks.safetensors of the expected pattern, None where dense.
    """

    model: str
    index: int
    prompt: list[int]
    params: dict[str, Any]
    expected: list[int]
    block_mask: str | None

    @property
    def name(self) -> str:
        kind = "sparse" if self.block_mask else "dense"
        return f"{self.model}-{self.index}-{kind}"

    @property
    def extra_args(self) -> dict[str, Any]:
        """The case as request parameters."""
        args: dict[str, Any] = {"diffusion_steps": self.params["steps"]}
        if "block" in self.params:
            args["diffusion_block_length"] = self.params["block"]
        if "alg" in self.params:
            args["diffusion_alg"] = self.params["alg"]
        sparsed = self.params.get("sparsed")
        if sparsed is None:
            args["sparsed_enabled"] = 0
        else:
            args.update({f"sparsed_{name}": value for name, value in sparsed.items()})
        return args

    def sampling_params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.params["gen"],
            ignore_eos=True,
            detokenize=False,
            extra_args=self.extra_args,
            **changes,
        )


def load_cases(model: str) -> list[GoldenCase]:
    data = json.loads((GOLDEN / model / "expected.json").read_text())
    return [
        GoldenCase(
            model=model,
            index=index,
            prompt=case["prompt_token_ids"],
            params=case["params"],
            expected=case["output_token_ids"],
            block_mask=case.get("block_mask"),
        )
        for index, case in enumerate(data)
    ]
