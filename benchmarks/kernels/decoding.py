"""Times one decoding step: greedy, sampled, and with each pace, from logits to decided tokens.

    python -m benchmarks.kernels.decoding
    python -m benchmarks.kernels.decoding --small

All ways take turns on the same logits, so that what else the machine does falls on each alike. The
first, a greedy step with a schedule, is what the others are compared with: the goal is +5% for the
paces, and for temperature with top_p and top_k +25% of a whole step of the model at 256 rows, whose
time --step-ms gives (8 ms of an 8B model on an H100). On CUDA vLLM's operation for top_k and top_p
is timed on the same logits; it draws nothing yet.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.environment import headline
from benchmarks.measuring.timing import time_calls
from vllm_sparsed.decoding.batch_decoder import BatchDecoder, Candidates
from vllm_sparsed.decoding.paces import RULES, ranking_of

VOCAB: Final = 152_064
SHAPES: Final = ((1, 32), (16, 32), (64, 32), (1, 256))
"""Requests, and candidates of each."""
SMALL_VOCAB: Final = 2_000
SMALL_SHAPES: Final = ((1, 32), (4, 32))
ROUNDS: Final = 5


@dataclass(frozen=True, slots=True)
class Way:
    """How a request decides."""

    name: str
    alg: str = "low_confidence"
    pace: str | None = None
    bound: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


WAYS: Final = (
    Way("greedy, scheduled"),
    Way("threshold", pace="threshold", bound=0.9),
    Way("factor", pace="factor", bound=1.0),
    Way("entropy bound", pace="entropy_bound", bound=0.1),
    Way("entropy threshold", pace="entropy_threshold", bound=0.4),
    Way("greedy, entropy", alg="entropy"),
    Way("temperature", temperature=0.2),
    Way("temperature, top_p", alg="entropy", temperature=0.2, top_p=0.95),
    Way("temperature, top_p, top_k", alg="entropy", temperature=0.2, top_p=0.95, top_k=50),
)


def candidates_of(way: Way, requests: int, each: int) -> Candidates:
    """All candidates of requests that decide alike."""

    def all_of(value: float, dtype: type) -> Any:
        return np.full(requests, value, dtype=dtype)

    request = np.repeat(np.arange(requests, dtype=np.int32), each)
    return Candidates(
        request=request,
        group=request,
        position=np.tile(np.arange(each, dtype=np.int32), requests),
        rule=all_of(0 if way.pace is None else RULES[way.pace], np.int64),
        quota=all_of(1, np.int64),
        bound=all_of(way.bound, np.float64),
        rankings=(ranking_of(way.alg, way.pace),) * requests,
        temperature=all_of(way.temperature, np.float64),
        top_p=all_of(way.top_p, np.float64),
        top_k=all_of(way.top_k, np.int64),
        alg_temp=all_of(0.0, np.float64),
        seed=np.arange(requests, dtype=np.int64),
        step=all_of(0, np.int64),
        probability=all_of(1.0, np.float64),
        cfg_scale=all_of(0.0, np.float64),
        logits_eos_inf=all_of(0, np.bool_),
        confidence_eos_eot_inf=all_of(0, np.bool_),
    )


def vllm_operation(logits: Tensor) -> Callable[[], object]:
    """vLLM's cut by top_k and top_p, which works in place on a copy."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    k = torch.full((len(logits),), 50, dtype=torch.int32, device=logits.device)
    p = torch.full((len(logits),), 0.95, device=logits.device)
    return lambda: apply_top_k_top_p(logits.float(), k, p)


def main() -> None:
    """Print one line per shape and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="sizes for CPUs")
    parser.add_argument("--step-ms", type=float, default=8.0, help="of the model's whole step")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab = SMALL_VOCAB if options.small else VOCAB
    budget_ms = 5.0 if options.small else 100.0
    decoder = BatchDecoder(
        vocab_size=vocab,
        mask_token_id=0,
        eos_token_id=None,
        eot_token_id=None,
        device=device,
        max_chunk_rows=max(16, 256 * 2**20 // (4 * vocab)),
    )
    print(f"{headline()}; {vocab} columns of bfloat16")
    for requests, each in SMALL_SHAPES if options.small else SHAPES:
        logits = 3 * torch.randn(requests * each, vocab, device=device)
        logits = logits.to(torch.bfloat16)
        runs: dict[str, Callable[[], object]] = {
            way.name: partial(
                decoder.decode, candidates_of(way, requests, each), logits, None, lambda x: x
            )
            for way in WAYS
        }
        if device == "cuda":
            runs["vLLM's top_k and top_p alone"] = vllm_operation(logits)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(time_calls(run, device, budget_ms).p50)
        medians = {name: statistics.median(values) for name, values in times.items()}
        greedy = medians[WAYS[0].name]
        for name, median in medians.items():
            step = (options.step_ms + median) / (options.step_ms + greedy)
            print(
                f"{requests:3} requests of {each:3}: {name:28} {median:9.3f} ms, "
                f"{median / greedy:6.2f} of greedy, {step:5.3f} of a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
