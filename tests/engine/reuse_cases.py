"""The golden cases of the reuse modes, as requests, and what an engine does with them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm import LLM, SamplingParams

from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.reuse import Pace, Reuse, generate_with_reuse
from benchmarks.reference.sparse_pattern import SparseSettings
from tests.engine.golden_cases import GOLDEN
from tests.engine.inspection import runner_of

PACES = {
    "threshold": ("threshold", "threshold"),
    "factor": ("factor", "factor"),
    "entropy_bound": ("entropy_bound", "gamma"),
    "entropy_threshold": ("entropy_threshold", "threshold"),
}

NAMES = ("dense", "build", "sparse")
"""Of the attention in the golden histories."""


@dataclass(frozen=True)
class ReuseCase:
    """One case of golden/parallel or golden/window, and what it is to give.

    Attributes:
        other: further options of the request.
    """

    model: str
    name: str
    prompt: list[int]
    params: dict[str, Any]
    expected: list[int]
    history: list[dict[str, Any]]
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_scheduled(self) -> bool:
        return self.params["alg"] not in PACES

    @property
    def extra_args(self) -> dict[str, Any]:
        """The case as request parameters."""
        params = self.params
        mode = params.get("cache", "window")
        args: dict[str, Any] = {
            "diffusion_kv_reuse": mode,
            "diffusion_block_length": params["block"],
            "sparsed_enabled": 0,
        }
        if self.is_scheduled:
            args |= {"diffusion_steps": params["steps"], "diffusion_alg": params["alg"]}
        else:
            name, key = PACES[params["alg"]]
            args[f"diffusion_{name}"] = params[key]
            if self.model == "dream-gqa":
                args["diffusion_alg"] = "maskgit_plus"
        if mode == "window":
            args |= {
                "diffusion_refresh_tokens": params["refresh_tokens"],
                "diffusion_window_margin": params["margin"],
                "diffusion_warmup_passes": params["warmup"],
            }
            if "refresh_passes" in params:
                args["diffusion_refresh_passes"] = params["refresh_passes"]
        if "sparsed" in params:
            args["sparsed_enabled"] = 1
            args |= {f"sparsed_{name}": value for name, value in params["sparsed"].items()}
        return args

    def sampling_params(self, **changes: Any) -> SamplingParams:
        """`changes`, and what is `other`: request parameters, or those of vLLM."""
        changes = {**self.other, **changes}
        ours = {name: value for name, value in changes.items() if name.startswith("diffusion_")}
        usual = {
            "temperature": 0.0,
            "max_tokens": self.params["gen"],
            "ignore_eos": True,
            "detokenize": False,
        }
        vllms = {name: value for name, value in changes.items() if name not in ours}
        return SamplingParams(**(usual | vllms), extra_args=self.extra_args | ours)


def load_reuse_cases(model: str) -> list[ReuseCase]:
    """Those whose passes keep something.

    Where Fast-dLLM decides a last rank that fails alone, which is no rule here, what the plain loop
    does without that is expected.
    """
    cases = []
    for folder in ("parallel", "window"):
        data = json.loads((GOLDEN / folder / f"{model}.json").read_text())
        for index, case in enumerate(data):
            if case["params"].get("cache") == "none":
                continue
            one = ReuseCase(
                model=model,
                name=f"{folder}-{model}-{index}",
                prompt=case["prompt_token_ids"],
                params=case["params"],
                expected=case["output_token_ids"],
                history=case["history"],
            )
            takes_last_rank = case.get("source") == "fast-dllm" and case.get("last_rank")
            cases.append(_without_last_rank(one) if takes_last_rank else one)
    return cases


def _without_last_rank(case: ReuseCase) -> ReuseCase:
    params = case.params
    passes = generate_with_reuse(
        ReferenceModel.load(GOLDEN / case.model, torch.float32),
        torch.tensor(case.prompt),
        params["gen"],
        params["block"],
        plain_pace(case),
        Reuse(params["cache"]),
    )
    prompt_len = len(case.prompt)
    decided = {position: token for one in passes for position, token in one.decided}
    history = [
        {
            "rows": "full" if one.rows is None else [row - prompt_len for row in one.rows],
            "decided": [[position - prompt_len, token] for position, token in one.decided],
        }
        for one in passes
    ]
    tokens = [decided[prompt_len + i] for i in range(params["gen"])]
    return replace(case, expected=tokens, history=history)


@dataclass
class Recorded:
    """What the runner computed for one request."""

    tokens: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def plain_pace(case: ReuseCase) -> Pace:
    """The case's pace for the plain loop."""
    alg = case.params["alg"]
    value = None if case.is_scheduled else case.params[PACES[alg][1]]
    return Pace(alg, value, case.params.get("steps", 0))


def plain_sparse(case: ReuseCase) -> SparseSettings | None:
    sparsed = case.params.get("sparsed")
    return SparseSettings(**sparsed) if sparsed else None


def run_recorded(
    llm: LLM,
    cases: Sequence[ReuseCase],
    *,
    preempt_after: int | None = None,
    after_pass: Callable[[Any], None] | None = None,
    others: dict[str, list[int]] | None = None,
) -> dict[str, Recorded]:
    """Run the cases together and record every pass, in the form of the golden histories.

    Args:
        preempt_after: preempt all requests after so many engine steps.
        after_pass: called with the states of each pass once it has been computed.
        others: gets the tokens of requests that were added before.
    """
    runner = runner_of(llm)
    recorded = {case.name: Recorded() for case in cases}
    denoise = runner._forward_and_decode
    faults: list[BaseException] = []

    def watch(states: Any, *arguments: Any) -> Any:
        before = [(state.window, NAMES[state.attention], state.judged.copy()) for state in states]
        result = denoise(states, *arguments)
        for state, tokens, (window, attention, judged) in zip(states, result, before, strict=True):
            prompt_len = state.plan.prompt_len
            run = recorded.get(state.request_id.rsplit("-", 1)[0])
            if run is None:
                continue
            run.history.append(
                {
                    "rows": "full" if window is None else [row - prompt_len for row in window],
                    "attention": attention,
                    "decided": [
                        [int(p) - prompt_len, int(t)]
                        for p, t in zip(judged, tokens, strict=True)
                        if t >= 0
                    ],
                }
            )
        if after_pass is not None:
            try:
                after_pass(states)
            except BaseException as error:
                # The runner would take it for a fault of the request.
                faults.append(error)
        return result

    runner._forward_and_decode = watch  # type: ignore[method-assign]
    steps = 0
    try:
        for case in cases:
            llm.llm_engine.add_request(
                case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
            )
        while llm.llm_engine.has_unfinished_requests():
            if steps == preempt_after:
                assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            for output in llm.llm_engine.step():
                tokens = list(output.outputs[0].token_ids)
                if output.request_id in recorded:
                    recorded[output.request_id].tokens = tokens
                elif others is not None:
                    others[output.request_id] = tokens
            steps += 1
    finally:
        del runner._forward_and_decode
    if faults:
        raise faults[0]
    return recorded
