"""Which documents a training step sees: from four facts and nothing else to 8,192 tokens."""

import random
from dataclasses import dataclass, field
from typing import Final

from small_model.training.data import TASK_NAMES, Stage

PASS_RATE: Final = 0.9  # of what is counted of every task (`Batch.questions`), to move on
MIN_ANSWERS: Final = 30  # counted ones of each task that a verdict needs
MOST_SEQUENCES: Final = 256  # of a batch: what is short is learnt in many steps
FROM_LAST_TWO: Final = 0.25  # share of the batches from the two stages before the current one
FROM_ALL_BEFORE: Final = 0.25  # and from any stage before it: what is not repeated is forgotten

_KEYS_ONLY: Final = (("multi_key", 1.0),)
_ALL_TASKS: Final = (
    ("single_needle", 0.02),
    ("multi_key", 0.03),
    ("multi_value", 0.08),
    ("variable_tracking", 0.12),
    ("common_words", 0.1),
    ("report", 0.06),
    ("chain", 0.08),
    ("ledger", 0.14),
    ("sorted_list", 0.1),
    ("records", 0.1),
    ("sum", 0.14),
    ("two_readings", 0.06),
)
# For the end: what takes longest to be right in every token.
_LONG_ANSWERS: Final = (
    ("multi_value", 0.05),
    ("variable_tracking", 0.04),
    ("common_words", 0.04),
    ("report", 0.04),
    ("chain", 0.1),
    ("ledger", 0.2),
    ("sorted_list", 0.2),
    ("records", 0.25),
    ("sum", 0.04),
    ("two_readings", 0.04),
)
# With two facts instead of four the second answer follows from the first, and no key is learnt.
# What is short takes a GPU hardly longer in batches four times as large.
STAGES: Final = (
    Stage(4, 256, False, 0.75, _KEYS_ONLY, patience=1500, batch_tokens=32_768),
    Stage(4, 384, False, 0.75, _ALL_TASKS, patience=1500, batch_tokens=65_536),
    Stage(8, 640, False, 0.5, _ALL_TASKS, patience=1500, batch_tokens=65_536),
    Stage(16, 1280, False, 0.5, _ALL_TASKS, patience=1200, batch_tokens=65_536),
    Stage(16, 1280, True, 0.5, _ALL_TASKS, patience=1500, batch_tokens=49_152),
    Stage(32, 2304, False, 0.25, _ALL_TASKS, patience=600),
    Stage(32, 2304, True, 0.25, _ALL_TASKS, patience=1000),
    Stage(64, 4096, True, 0.25, _ALL_TASKS, patience=1500),
    Stage(64, 8192, True, 0.0, _ALL_TASKS, patience=4400),
    Stage(32, 2304, True, 0.0, _LONG_ANSWERS),
)


@dataclass(slots=True)
class Curriculum:
    """Where training stands.

    Attributes:
        stages: of the whole training.
        stage: index of the current one.
        since: step at which it began.
        correct: answers right since the last verdict, per task.
        asked: answers counted since then, per task.
    """

    stages: tuple[Stage, ...]
    stage: int = 0
    since: int = 0
    correct: list[int] = field(default_factory=lambda: [0] * len(TASK_NAMES))
    asked: list[int] = field(default_factory=lambda: [0] * len(TASK_NAMES))

    def stage_of(self, seed: int, step: int) -> int:
        """Index of the stage that a step's batch comes from."""
        rng = random.Random(f"stage/{seed}/{step}")
        draw = rng.random()
        if self.stage and draw < FROM_LAST_TWO:
            return rng.randint(max(0, self.stage - 2), self.stage - 1)
        if self.stage and draw < FROM_LAST_TWO + FROM_ALL_BEFORE:
            return rng.randrange(self.stage)
        return self.stage

    def add(self, correct: list[int], asked: list[int]) -> None:
        """Count answers of batches of the current stage, per task."""
        self.correct = [a + b for a, b in zip(self.correct, correct, strict=True)]
        self.asked = [a + b for a, b in zip(self.asked, asked, strict=True)]

    def exact_match(self) -> dict[str, float]:
        """Since the last verdict, by task; tasks without answers are left out."""
        counts = zip(TASK_NAMES, self.correct, self.asked, strict=True)
        return {name: correct / asked for name, correct, asked in counts if asked}

    def verdict(self, step: int) -> str | None:
        """Move on if the stage is passed; says why, None if it goes on.

        The counts start afresh once there are enough for a verdict.
        """
        judged = [TASK_NAMES.index(name) for name, _ in self.stages[self.stage].weights]
        rates = [self.correct[i] / self.asked[i] for i in judged if self.asked[i]]
        patience = self.stages[self.stage].patience
        late = patience is not None and step - self.since >= patience
        enough = all(self.asked[i] >= MIN_ANSWERS for i in judged)
        if not rates or not (enough or late):
            return None
        rate = min(rates)
        self.correct, self.asked = [0] * len(TASK_NAMES), [0] * len(TASK_NAMES)
        if self.stage == len(self.stages) - 1 or not (rate > PASS_RATE or late):
            return None
        self.stage, self.since = self.stage + 1, step
        return f"exact match {rate:.3f}" + ("" if rate > PASS_RATE else ", out of patience")
