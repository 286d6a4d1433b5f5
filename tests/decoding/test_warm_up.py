"""The steps that compile the decoding kernels at start run every variant of them."""

import itertools
from typing import Any

import torch

from vllm_sparsed.decoding.algorithms import ALGORITHMS
from vllm_sparsed.decoding.arrangement import arrange
from vllm_sparsed.decoding.batch_decoder import BatchDecoder
from vllm_sparsed.decoding.paces import RULES, ranking_of
from vllm_sparsed.worker.decoding_warm_up import variants, warm_up_decoding

VOCAB_SIZE = 64


def test_every_ranking_with_every_treatment() -> None:
    seen = set()
    for candidates in variants():
        for segment in arrange(candidates, VOCAB_SIZE).segments:
            t = segment.treatment
            seen.add((t.ranking, t.sampled, t.top_p, t.top_k, t.guided, t.without_eos))
    for alg, pace in itertools.product(ALGORITHMS, [None, *RULES]):
        ranking = ranking_of(alg, pace)
        for sampled in (False, True):
            assert (ranking, sampled, False, False, False, False) in seen
            assert (ranking, sampled, False, False, True, False) in seen
            assert (ranking, sampled, False, False, False, True) in seen
            if sampled or ranking.shaped:
                for cut in ((True, False), (False, True), (True, True)):
                    assert (ranking, sampled, *cut, False, False) in seen


def test_every_form_of_the_decision() -> None:
    seen = set()
    for candidates in variants():
        fields = arrange(candidates, VOCAB_SIZE).fields
        seen.add(
            tuple(
                getattr(fields, name) is not None
                for name in ("rule", "probability", "order", "alg_temp")
            )
        )
    assert seen >= set(itertools.product((False, True), repeat=4))


def test_they_run() -> None:
    decoder = BatchDecoder(
        vocab_size=VOCAB_SIZE,
        mask_token_id=63,
        eos_token_id=2,
        eot_token_id=5,
        device="cpu",
        max_chunk_rows=16,
    )
    head = torch.randn(8, VOCAB_SIZE)
    sizes: list[Any] = []

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ head

    count = warm_up_decoding(decoder, 8, torch.float32, compute_logits)
    assert count == len(list(variants())) <= len(sizes)
    assert max(sizes) <= 2, "it takes no memory to speak of"
