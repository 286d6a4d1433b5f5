"""What chance decides has the distribution it should have (chi-square, fixed seeds)."""

import itertools

import numpy as np
import pytest
import torch

from vllm_sparsed.decoding import ALGORITHMS
from vllm_sparsed.decoding.batch_decoder import BatchDecoder, Candidates

REPEATS = 20_000
# Quantile 1 - 1e-5 of the chi-square distribution by degrees of freedom.
LIMITS = {1: 19.5, 2: 23.0, 3: 25.9, 5: 30.9}


def run(logits: torch.Tensor, algs: tuple[str, ...], **options: float) -> np.ndarray:
    """Decode REPEATS requests, alike but for their seed; returns tokens [REPEATS, rows]."""
    per_request = logits.shape[0]
    defaults = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "alg_temp": 0.0,
        "step": 0,
        "quota": per_request,
        "probability": 1.0,
        "cfg_scale": 0.0,
        "logits_eos_inf": False,
        "confidence_eos_eot_inf": False,
    }
    request = np.repeat(np.arange(REPEATS, dtype=np.int32), per_request)
    candidates = Candidates(
        request=request,
        group=request,
        rule=np.zeros(REPEATS, dtype=np.int64),
        bound=np.zeros(REPEATS),
        position=np.tile(np.arange(per_request, dtype=np.int32), REPEATS),
        rankings=(ALGORITHMS[algs[0]].ranking,) * REPEATS,
        seed=np.arange(REPEATS),
        **{name: np.full(REPEATS, value) for name, value in (defaults | options).items()},
    )
    decoder = BatchDecoder(
        vocab_size=logits.shape[1],
        mask_token_id=0,
        eos_token_id=None,
        eot_token_id=None,
        device="cpu",
        max_chunk_rows=10**6,
    )
    tokens = decoder.decode(candidates, logits.repeat(REPEATS, 1), None, lambda hidden: hidden)
    return tokens.view(REPEATS, per_request).numpy()


def assert_distribution(counts: np.ndarray, probabilities: np.ndarray) -> None:
    possible = probabilities > 0
    assert counts.sum() == REPEATS
    assert not counts[~possible].any()
    wanted = REPEATS * probabilities[possible]
    statistic = float(((counts[possible] - wanted) ** 2 / wanted).sum())
    assert statistic < LIMITS[int(possible.sum()) - 1]


@pytest.mark.parametrize("alg", ["low_confidence", "random", "origin", "maskgit_plus", "entropy"])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({"temperature": 1.0}, 4, id="plain"),
        pytest.param({"temperature": 0.5}, 4, id="cold"),
        pytest.param({"temperature": 3.0}, 4, id="hot"),
        pytest.param({"temperature": 1.0, "top_k": 2}, 2, id="top_k"),
        # 0.4 + 0.3 are not above 0.75; the third passes it and stays.
        pytest.param({"temperature": 1.0, "top_p": 0.75}, 3, id="top_p"),
    ],
)
def test_candidates(alg: str, options: dict[str, float], kept: int) -> None:
    probabilities = np.array([0.1, 0.4, 0.3, 0.2])
    logits = torch.tensor(np.log(probabilities), dtype=torch.float32)[None]
    shaped = probabilities ** (1 / options["temperature"])
    shaped[np.argsort(-shaped)[kept:]] = 0
    counts = np.bincount(run(logits, (alg,), **options)[:, 0], minlength=4)
    assert_distribution(counts, shaped / shaped.sum())


@pytest.mark.parametrize("alg_temp", [0.3, 2.0])
@pytest.mark.parametrize("alg", ["low_confidence", "maskgit_plus"])
def test_order_is_drawn_without_replacement(alg: str, alg_temp: float) -> None:
    confidence = np.array([0.9, 0.75, 0.6, 0.55])
    logits = torch.tensor(np.log(np.stack([confidence, 1 - confidence], 1)), dtype=torch.float32)
    chosen = run(logits, (alg,), alg_temp=alg_temp, quota=2) >= 0
    assert (chosen.sum(1) == 2).all()
    weights = np.exp(confidence / alg_temp)
    weights /= weights.sum()
    pairs = list(itertools.combinations(range(4), 2))
    probabilities = np.array(
        [
            weights[a] * weights[b] / (1 - weights[a]) + weights[b] * weights[a] / (1 - weights[b])
            for a, b in pairs
        ]
    )
    counts = np.array([(chosen[:, a] & chosen[:, b]).sum() for a, b in pairs])
    assert_distribution(counts, probabilities)


def test_random_order_is_uniform() -> None:
    chosen = run(torch.eye(4, 6), ("random",), quota=2) >= 0
    pairs = itertools.combinations(range(4), 2)
    counts = np.array([(chosen[:, a] & chosen[:, b]).sum() for a, b in pairs])
    assert_distribution(counts, np.full(6, 1 / 6))


def test_origin_unmasks_each_row_on_its_own() -> None:
    chosen = run(torch.eye(2, 3), ("origin",), probability=0.3) >= 0
    counts = np.bincount(chosen @ [1, 2], minlength=4)
    assert_distribution(counts, np.array([0.49, 0.21, 0.21, 0.09]))
