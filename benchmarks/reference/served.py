"""One request in vLLM, its denoising steps taken one by one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.reference.generate import Noise, Sampling, llada_blocks
from benchmarks.reference.paced import Pace
from benchmarks.reference.sparse_pattern import SparseSettings

LLADA_ALGORITHMS = ("low_confidence", "random")
DREAM_ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
RELEASED_TOKENS = {"LLaDAModelLM": (126336, 126081), "DreamModel": (151666, 151643)}


@dataclass(frozen=True)
class Task:
    """The request, the same for both sides."""

    model: str
    config: dict[str, Any]
    prompt: list[int]
    canvas: int
    steps: int
    block_length: int
    alg: str
    sampling: Sampling
    eps: float
    seed: int
    sparse: SparseSettings | None
    pace: Pace | None = None

    @property
    def architecture(self) -> str:
        name: str = self.config["architectures"][0]
        return name

    @property
    def mask_token_id(self) -> int:
        token = self.config.get("mask_token_id")
        return RELEASED_TOKENS[self.architecture][0] if token is None else int(token)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        masks = self.prompt.count(self.mask_token_id)
        return llada_blocks(self.canvas, self.block_length, self.steps, masks)


@dataclass(frozen=True)
class LogitsSample:
    """The reference's logits of one forward pass.

    Attributes:
        step: whose tokens were run.
        tokens: int64 [L].
        rows: int64 [rows], those compared.
        logits: float32 [rows, vocabulary].
    """

    step: int
    tokens: Tensor
    rows: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ServedRun:
    """What vLLM did: the tokens [L] after each step, and its logits for each sample."""

    after: list[list[int]]
    logits: list[Tensor]
    output: list[int]


def run_served(task: Task, samples: Sequence[LogitsSample], **engine: Any) -> ServedRun:
    """Run the request in vLLM.

    Args:
        task: the request.
        samples: forward passes whose logits are wanted.
        engine: arguments of `vllm.LLM`.
    """
    # The engine core in this process: its steps can then be taken one by one.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {
        "diffusion_steps": task.steps if task.pace is None else task.pace.steps,
        "diffusion_alg": task.alg,
        "diffusion_cfg_scale": task.sampling.cfg_scale,
        "diffusion_alg_temp": task.sampling.alg_temp,
        "diffusion_eps": task.eps,
    }
    if task.alg in LLADA_ALGORITHMS or task.pace is not None:
        extra["diffusion_block_length"] = task.block_length
    if task.pace is not None:
        extra |= pace_arguments(task.pace)
    options: dict[str, Any] = {"sparsed": {}}
    if task.sparse is None:
        extra["sparsed_enabled"] = False
    else:
        settings = {
            "dense_if_faster": False,
            "skip": task.sparse.skip,
            "select": task.sparse.select,
            "block_size": task.sparse.block_size,
        }
        extra.update({f"sparsed_{name}": value for name, value in settings.items()})
        options["sparsed"] = settings
    length = len(task.prompt) + task.canvas
    llm = LLM(
        task.model,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_batched_tokens=2 * length,
        additional_config=options,
        **engine,
    )
    params = SamplingParams(
        temperature=task.sampling.temperature,
        top_p=task.sampling.top_p,
        top_k=task.sampling.top_k,
        seed=task.seed,
        max_tokens=task.canvas,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )
    logits = [
        llm.collective_rpc(dense_logits, args=(sample.tokens.tolist(), sample.rows.tolist()))[0]
        for sample in samples
    ]
    llm.llm_engine.add_request("compared", {"prompt_token_ids": task.prompt}, params)
    after: list[list[int]] = []
    output: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for finished in llm.llm_engine.step():
            output = list(finished.outputs[0].token_ids)
        tokens = llm.collective_rpc(present_tokens)[0]
        if tokens is not None:
            after.append(tokens)
    return ServedRun(after, logits, output)


def pace_arguments(pace: Pace) -> dict[str, Any]:
    """A pace as parameters of a request."""
    arguments: dict[str, Any] = {f"diffusion_{pace.name}": pace.value}
    if pace.block_add is not None:
        arguments["diffusion_block_add"] = pace.block_add
        arguments["diffusion_block_full"] = pace.block_full
    return arguments


def present_tokens(worker: Any) -> list[int] | None:
    """In a worker: the tokens of the one request that runs."""
    for state in worker.model_runner.requests.values():
        tokens: list[int] = state.tokens.tolist()
        return tokens
    return None


@torch.inference_mode()
def dense_logits(worker: Any, tokens: list[int], rows: list[int]) -> Tensor:
    """In a worker: float32 logits [rows, vocabulary] of a dense forward pass."""
    runner = worker.model_runner
    positions, attention = runner.packer.dense_batch([len(tokens)])
    ids = torch.tensor(tokens, dtype=torch.int32, device=runner.device)
    hidden = runner.run_model(ids, positions, attention)
    logits: Tensor = runner.model.compute_logits(hidden[torch.tensor(rows, device=runner.device)])
    return logits.float().cpu()


def served_noise(seed: int) -> Noise:
    """The random numbers that the served request draws, so that both sides draw the same."""
    from vllm_sparsed.decoding.rng import Stream, uniform

    streams = {
        "candidate": Stream.CANDIDATE,
        "random_order": Stream.RANDOM_ORDER,
        "order_noise": Stream.ORDER_NOISE,
        "origin": Stream.ORIGIN,
    }

    def noise(purpose: str, step: int, positions: Tensor, columns: int | None) -> Tensor:
        def filled(value: int) -> Tensor:
            return torch.full_like(positions, value)

        return uniform(filled(seed), filled(step), positions.clone(), streams[purpose], columns)

    return noise
