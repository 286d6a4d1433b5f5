"""What the workers tell the scheduler of each denoising step."""

from dataclasses import dataclass, field
from typing import Final, Literal

from vllm.v1.outputs import ModelRunnerOutput

Attention = Literal["dense", "building", "sparse"]

ATTENTIONS: Final[tuple[Attention, ...]] = ("dense", "building", "sparse")


@dataclass(slots=True)
class StepReport:
    """One request's step.

    Attributes:
        attention: how it attended; building: densely, and its patterns were built.
        candidates: positions that the step could have decided.
        decided: positions that it did decide.
        next_tokens: tokens that the request's steps take of the budget from the next one on; 0: as
            many as this one.
        kept_blocks, pattern_blocks: key blocks that the patterns built in this step keep, of so
            many, over layers and heads.
        error: why the request cannot go on; None: it can.
    """

    attention: Attention = "dense"
    candidates: int = 0
    decided: int = 0
    next_tokens: int = 0
    kept_blocks: int = 0
    pattern_blocks: int = 0
    error: str | None = None


@dataclass
class DenoisingOutput(ModelRunnerOutput):
    """vLLM's output of a step, with a report of each request.

    The executors carry it to the scheduler as they carry vLLM's: by reference, or pickled.
    """

    reports: dict[str, StepReport] = field(default_factory=dict)
