"""Tasks with known answers in long documents: six look-ups, six whose answers build on themselves.

Every document is made from templates, for any length, and depends on its seed alone.
"""

from small_model.tasks.dependent import DEPENDENT_TASKS
from small_model.tasks.documents import (
    MAX_FACTS,
    SPLITS,
    TASKS,
    TOKENS_PER_FACT,
    CountTokens,
    Document,
    Limits,
    make_document,
)
from small_model.tasks.facts import CODE_DIGITS, Fact, Question
from small_model.tasks.lookups import LOOKUP_TASKS
from small_model.tasks.scoring import LINE_TASKS, canvas_of, is_correct, right_lines

__all__ = [
    "CODE_DIGITS",
    "DEPENDENT_TASKS",
    "LINE_TASKS",
    "LOOKUP_TASKS",
    "MAX_FACTS",
    "SPLITS",
    "TASKS",
    "TOKENS_PER_FACT",
    "CountTokens",
    "Document",
    "Fact",
    "Limits",
    "Question",
    "canvas_of",
    "is_correct",
    "make_document",
    "right_lines",
]
