"""Compiles at start what the decoding steps of any request may call.

Otherwise the first request with another algorithm, temperature or option would stop all others for
as long as Triton takes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparsed.decoding.algorithms import Ranking
from vllm_sparsed.decoding.batch_decoder import BatchDecoder
from vllm_sparsed.decoding.candidates import Candidates
from vllm_sparsed.decoding.treatments import RANKINGS
from vllm_sparsed.kernels.confidence_ranking.configs import Rule


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for, as far as it decides which kernels run."""

    ranking: Ranking = RANKINGS[0]
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    cfg_scale: float = 0.0
    alg_temp: float = 0.0
    rule: Rule = Rule.COUNT
    probability: float = 1.0
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False


def candidates_of(asked: Asked, *others: Asked, number: int = 1) -> Candidates:
    """So many candidates of each request, of which one is decided."""
    requests = (asked, *others)
    index = np.repeat(np.arange(len(requests), dtype=np.int32), number)

    def each(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(request, name) for request in requests], dtype=dtype)

    return Candidates(
        request=index,
        group=index,
        position=np.tile(np.arange(number, dtype=np.int32), len(requests)),
        rule=each("rule", np.int64),
        quota=np.ones(len(requests), dtype=np.int64),
        bound=np.ones(len(requests), dtype=np.float64),
        rankings=tuple(request.ranking for request in requests),
        temperature=each("temperature", np.float64),
        top_p=each("top_p", np.float64),
        top_k=each("top_k", np.int64),
        alg_temp=each("alg_temp", np.float64),
        seed=np.zeros(len(requests), dtype=np.int64),
        step=np.zeros(len(requests), dtype=np.int64),
        probability=each("probability", np.float64),
        cfg_scale=each("cfg_scale", np.float64),
        logits_eos_inf=each("logits_eos_inf", np.bool_),
        confidence_eos_eot_inf=each("confidence_eos_eot_inf", np.bool_),
    )


def variants() -> Iterator[Candidates]:
    """Steps that together run every variant of the decoding kernels."""
    for ranking, temperature in itertools.product(RANKINGS, (0.0, 1.0)):
        yield candidates_of(Asked(ranking, temperature))
        # Logits that are computed anew lie otherwise in memory than those of the head.
        yield candidates_of(Asked(ranking, temperature, cfg_scale=1.0))
        yield candidates_of(Asked(ranking, temperature, logits_eos_inf=True))
        for top_p, top_k in ((0.9, 0), (1.0, 5), (0.9, 5)):
            yield candidates_of(Asked(ranking, temperature, top_p, top_k))
    yield candidates_of(Asked(confidence_eos_eot_inf=True))
    choices = itertools.product((Rule.COUNT, Rule.THRESHOLD), (1.0, 0.5), (0.0, 1.0), (False, True))
    for rule, probability, alg_temp, unordered in choices:
        greedy = Asked(rule=rule, probability=probability, alg_temp=alg_temp)
        sampled = Asked(temperature=1.0)
        # Greedy candidates come first: after sampled ones they have to be put in order.
        yield candidates_of(*((sampled, greedy) if unordered else (greedy, sampled)))


def warm_up_decoding(
    decoder: BatchDecoder,
    hidden_size: int,
    dtype: torch.dtype,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> int:
    """Run all variants once.

    Returns:
        How many steps that were.
    """
    count = 0
    for candidates in variants():
        hidden = torch.zeros(
            (candidates.request.size, hidden_size), dtype=dtype, device=decoder.device
        )
        guided = int((candidates.cfg_scale > 0)[candidates.request].sum())
        decoder.decode(candidates, hidden, hidden[:guided] if guided else None, compute_logits)
        count += 1
    return count
