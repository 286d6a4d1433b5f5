"""The canvas of a request for those who watch it, on its way from the worker to a viewer.

Neither PyTorch nor vLLM is imported here.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final

SPECIAL: Final = "·"  # stands for a special token, such as the end of the turn
UNPRINTABLE: Final = "⏎"  # for a line break, a tab or another character without a picture


@dataclass(frozen=True, slots=True)
class ShownCanvas:
    """The canvas of one choice of a request, after some of its passes.

    Attributes:
        prompt: index of the choice's prompt in its request.
        index: of the choice among those of its prompt.
        passes: forward passes done.
        most_passes: as many as the request takes, at most.
        sparse_from: the first pass with sparse attention, counted from 1; None: there was none yet.
        finished: whether the request has ended; masks may be left where an end of text was decided.
        tokens: the canvas, with infilling after the prompt; None where it is still a mask.
        decided_in: for each token the pass, counted from 1, that decided it; 0: a mask, or a token
            that the prompt gave or that had been sent before a preemption.
    """

    prompt: int
    index: int
    passes: int
    most_passes: int
    sparse_from: int | None
    finished: bool
    tokens: list[int | None]
    decided_in: list[int]

    @property
    def is_sparse(self) -> bool:
        """Whether the last pass ran with sparse attention."""
        return self.sparse_from is not None

    def to_fields(self) -> dict[str, Any]:
        """The fields, which other processes make it again from; lists are not copied."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
