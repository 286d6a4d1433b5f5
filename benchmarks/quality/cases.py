"""Questions as prompts of a length, made once and shared by settings and processes."""

import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final

from small_model import tasks, words
from small_model.tasks import Limits, canvas_of, make_document

# What a prompt depends on.
_SOURCES: Final = (
    Path(__file__),
    *sorted(Path(tasks.__file__).parent.glob("*.py")),
    Path(words.__file__),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One question to ask: prompt tokens and the answer expected.

    Attributes:
        document: number of its document within task and length.
        canvas: tokens that hold the answer and the end of its turn.
    """

    task: str
    length: int
    document: int
    prompt: list[int]
    answer: str
    canvas: int = 32


def make_cases(
    tokenizer: Any,
    tasks: Iterable[str],
    lengths: Iterable[int],
    documents: int,
    canvas: int | None = None,
) -> list[Case]:
    """Questions whose prompt and canvas fit each length.

    Args:
        tokenizer: of transformers, with a chat template.
        tasks: names of `TASKS`.
        lengths: tokens of prompt and canvas together.
        documents: per task and length.
        canvas: tokens of every answer; None: as many as the task's longest may take
            (`canvas_of`).
    """

    @lru_cache(maxsize=200_000)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    overhead = len(chat_prompt(tokenizer, ""))
    cases = []
    for task, length, seed in itertools.product(tasks, lengths, range(documents)):
        room, tokens = length, canvas or canvas_of(task)
        while True:
            document = make_document(
                task, "test", seed, Limits(room, count, overhead, canvas=tokens)
            )
            question = document.questions[0]
            prompt = chat_prompt(tokenizer, document.prompt(question))
            excess = len(prompt) + tokens - length
            if excess <= 0:
                break
            # Tokens may join differently where lines do.
            room -= excess
        cases.append(Case(task, length, seed, prompt, question.answer, tokens))
    return cases


def chat_prompt(tokenizer: Any, content: str) -> list[int]:
    """Tokens of a user's first message, up to where the answer begins."""
    message = [{"role": "user", "content": content}]
    ids: list[int] = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def cached_cases(
    folder: Path,
    tokenizer: Any,
    tasks: Iterable[str],
    lengths: Iterable[int],
    documents: int,
    canvas: int | None = None,
) -> list[Case]:
    """`make_cases` through files of a folder, a file per task and length.

    Processes that start together share the work: each makes the files that no other is at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = _fingerprint(tokenizer)
    groups = list(itertools.product(tasks, lengths))
    paths = {
        group: folder
        / f"{group[0]}-{group[1]}-{documents}x{canvas or canvas_of(group[0])}-{mark}.json"
        for group in groups
    }

    def make(task: str, length: int, path: Path, wait: bool) -> None:
        with path.with_suffix(".lock").open("w") as lock:
            if not _locked(lock, wait) or path.exists():
                return
            made = make_cases(tokenizer, [task], [length], documents, canvas)
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(json.dumps([asdict(case) for case in made]))
            unfinished.rename(path)

    for wait, (group, path) in itertools.product((False, True), paths.items()):
        if not path.exists():
            make(*group, path, wait)
    return [Case(**case) for path in paths.values() for case in json.loads(path.read_text())]


def _locked(lock: IO[str], wait: bool) -> bool:
    """Take the lock; False where another process has it and `wait` is not set."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _fingerprint(tokenizer: Any) -> str:
    """Changes with the tokenizer, its template and the code that makes documents."""
    sources = [path.read_text() for path in _SOURCES]
    tokens = chat_prompt(tokenizer, "\n".join(sources))
    return hashlib.sha256(json.dumps([sources, tokens]).encode()).hexdigest()[:12]
