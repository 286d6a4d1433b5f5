"""Which running requests take a step: turns that are fair by tokens.

Deficit round robin (Shreedhar and Varghese, 1996) over engine steps. The tokens of every engine
step are shared out to all running requests by weight, and those that took part are charged with
what they used: the difference is what a request is owed, its deficit counter. Requests go first
that are owed most. One whose step is larger than what the others leave is owed more with every
engine step that it waits, until it is the first, and the first always fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MIN_STEP_TOKENS: Final = 256
"""A pass of fewer tokens takes as long as one of so many, because all weights are read in either: a
smaller batch is charged so, and by so many tokens a request may be ahead of its share, which keeps
requests of similar lengths in one batch."""


@dataclass(slots=True, eq=False)
class Turn:
    """A running request, as far as its turns go.

    Attributes:
        tokens: of the budget that its next step takes, at most the whole.
        cost: tokens that this step computes, for which the request is charged.
        weight: its share of the engine's tokens, relative to other requests'.
        deficit: tokens it is owed; negative: tokens it has had too many.
        last_step: number of the engine step that it last took part in, -1 before the first.
    """

    tokens: int
    cost: int
    weight: float = 1.0
    deficit: float = 0.0
    last_step: int = -1


class FairTurns:
    """Chooses the requests of each engine step."""

    def __init__(self, budget: int) -> None:
        """Prepare.

        Args:
            budget: most tokens of one engine step.
        """
        self._budget = budget
        self._step = 0

    def choose(self, turns: Sequence[Turn]) -> list[int]:
        """Choose who takes part in the next engine step, and charge them.

        Args:
            turns: of all requests that could; each step of them fits the budget by itself.

        Returns:
            Ascending indices into `turns`, at least one if there are any.
        """
        if not turns:
            return []
        total_weight = sum(turn.weight for turn in turns)
        # Requests come and go with what they are owed; what counts is the difference to the others.
        mean = sum(turn.deficit for turn in turns) / total_weight
        for turn in turns:
            turn.deficit -= turn.weight * mean

        order = sorted(
            range(len(turns)),
            key=lambda i: (-turns[i].deficit / turns[i].weight, turns[i].last_step),
        )
        left = self._budget
        chosen: list[int] = []
        for i in order:
            # Not everything that fits: a step takes as long as all its tokens, so a long request
            # beside short ones in each of their steps would take many times their tokens.
            ahead = bool(chosen) and turns[i].deficit < -MIN_STEP_TOKENS
            if turns[i].tokens <= left and not ahead:
                left -= turns[i].tokens
                chosen.append(i)
        self._charge(turns, chosen, total_weight)
        return sorted(chosen)

    def _charge(self, turns: Sequence[Turn], chosen: Sequence[int], total_weight: float) -> None:
        used = sum(turns[i].cost for i in chosen)
        charged = max(used, MIN_STEP_TOKENS)
        for i in chosen:
            turns[i].deficit -= turns[i].cost * charged / used
            turns[i].last_step = self._step
        for turn in turns:
            share = turn.weight / total_weight
            # One that could not use its share, because it takes one step at a time, keeps what a
            # full step of others gives it and no more.
            most = turn.cost + max(self._budget, charged) * share
            turn.deficit = min(turn.deficit + charged * share, most)
        self._step += 1
