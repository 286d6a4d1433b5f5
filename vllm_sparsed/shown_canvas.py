"""The canvas of a request for those who watch it, on its way from the worker to a viewer.

Neither PyTorch nor vLLM is imported here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

SPECIAL: Final = "·"  # stands for a special token, such as the end of the turn
UNPRINTABLE: Final = "⏎"  # for a line break, a tab or another character without a picture


@dataclass(frozen=True, slots=True)
class ShownCanvas:
    """The canvas of one choice of a request, after `step` of its steps.

    Attributes:
        prompt: index of the choice's prompt in its request.
        index: of the choice among those of its prompt.
        step: denoising steps done.
        steps: denoising steps planned.
        passes: steps done that ran the model; one that decides nothing does not.
        sparse_from: the first step with sparse attention, counted from 1; None: all are dense.
        finished: whether the request has ended; masks may be left where an end of text was decided.
        tokens: the canvas; None where it is still a mask.
        decided_in: for each token the step, counted from 1, that decided it; 0: a mask.
    """

    prompt: int
    index: int
    step: int
    steps: int
    passes: int
    sparse_from: int | None
    finished: bool
    tokens: list[int | None]
    decided_in: list[int]

    @property
    def is_sparse(self) -> bool:
        """Whether the last step ran with sparse attention."""
        return self.sparse_from is not None and self.step >= self.sparse_from

    @property
    def num_decided(self) -> int:
        return sum(token is not None for token in self.tokens)


def token_texts(tokenizer: Any) -> Callable[[int], str]:
    """How a viewer shows a token: on one line, special tokens as one sign.

    Args:
        tokenizer: Hugging Face's, with `decode` and `all_special_ids`.
    """
    special = frozenset(tokenizer.all_special_ids)

    def text(token: int) -> str:
        return SPECIAL if token in special else on_one_line(tokenizer.decode([token]))

    return text


def on_one_line(text: str) -> str:
    """`text` with a sign in place of each character that would spoil a picture."""
    return "".join(char if char.isprintable() else UNPRINTABLE for char in text)
