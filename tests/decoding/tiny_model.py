"""A random model of one layer: fast, and often as sure of the mask token as of any other."""

import torch
from torch import Tensor

from benchmarks.reference.generate import Request, Sampling, Step
from benchmarks.reference.models import LayerAttention
from benchmarks.reference.paced import Pace, generate_paced
from benchmarks.reference.served import served_noise
from tests.decoding.plain_engine import Pass, PlainEngine

VOCAB, MASK, WIDTH = 19, 18, 12


class TinyModel:
    """Every token attends to every other once; logits [L, VOCAB] of tokens [L]."""

    def __init__(self, seed: int, sharpness: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.randn(VOCAB, WIDTH, generator=generator)
        self.positions = torch.randn(256, WIDTH, generator=generator)
        self.out = torch.randn(WIDTH, VOCAB, generator=generator) * sharpness / WIDTH**0.5

    def logits(
        self, tokens: Tensor, masks: list[Tensor] | None = None
    ) -> tuple[Tensor, list[LayerAttention]]:
        hidden = self.embedding[tokens] + self.positions[: len(tokens)]
        mixed = (hidden @ hidden.T / WIDTH).softmax(dim=1) @ hidden
        return torch.tanh(hidden + mixed) @ self.out, []

    def engine(self, shift: bool = False) -> PlainEngine:
        return PlainEngine(self, vocab_size=VOCAB, mask_token_id=MASK, shift=shift)


class TinySequence:
    """What the reference's loops ask for."""

    def __init__(self, model: TinyModel) -> None:
        self.model = model

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        return self.model.logits(tokens)[0]


def reference_request(
    model: TinyModel, prompt: list[int], canvas: int, sampling: Sampling, seed: int, shift: bool
) -> Request:
    return Request(
        new_sequence=lambda: TinySequence(model),
        prompt=torch.tensor(prompt),
        canvas_len=canvas,
        mask_token_id=MASK,
        logit_shift=shift,
        sampling=sampling,
        noise=served_noise(seed),
    )


def passes_of(steps: list[Step], prompt_len: int) -> list[Pass]:
    """Of each step [canvas position, token] of what became a token."""
    return [
        [
            [position - prompt_len, token]
            for position, token in zip(step.positions, step.tokens, strict=True)
            if position >= prompt_len and token != MASK
        ]
        for step in steps
    ]


def paced_passes(request: Request, pace: Pace) -> list[Pass]:
    return passes_of(generate_paced(request, pace), len(request.prompt))
