"""How alike SparseD's patterns are across steps and across heads, from a dense run.

In every step of a request with full attention each layer's pattern is built and kept. The overlap
of two patterns is Dice's coefficient of their kept blocks, 2 |A and B| / (|A| + |B|); two patterns
chosen at random would have their density.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.quality.answering import Asking
from benchmarks.quality.cases import Case
from benchmarks.quality.settings import DENSE, Setting
from benchmarks.quality.variants import install, start_recording, take_recorded

FILE_NAME: Final = "similarity.csv"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two patterns of one layer, averaged over the documents.

    Attributes:
        kind: "steps": first and second are steps, averaged over heads; "heads": query heads,
            averaged over steps.
        density: share of the blocks that the layer's patterns keep.
    """

    kind: str
    block_size: int
    layer: int
    first: int
    second: int
    overlap: float
    density: float


def record_patterns(llm: Any, case: Case, setting: Setting, asking: Asking) -> Tensor:
    """Patterns of one question, bool [steps, layers, heads, n, n].

    Args:
        llm: an engine as that of `answer_cases`.
        setting: its select and block_size say which patterns.
    """
    from vllm import SamplingParams

    llm.collective_rpc(
        start_recording, args=(asking.canvas_of(case), setting.block_size, setting.select)
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=asking.canvas_of(case),
        # All steps, whether anything visible is left to decide or not.
        ignore_eos=True,
        extra_args=asking.extra_args(case, DENSE),
    )
    llm.generate({"prompt_token_ids": case.prompt}, params, use_tqdm=False)
    patterns: Tensor = llm.collective_rpc(take_recorded)[0]
    llm.collective_rpc(install, args=(DENSE,))
    return patterns


def measure(
    llm: Any, cases: Sequence[Case], settings: Iterable[Setting], asking: Asking
) -> list[Overlap]:
    """Overlaps for the block size of each setting."""
    found = []
    for setting in settings:
        assert setting.block_size is not None
        recorded = [record_patterns(llm, case, setting, asking) for case in cases]
        found += overlaps(recorded, setting.block_size)
    return found


def overlaps(recorded: Sequence[Tensor], block_size: int) -> list[Overlap]:
    """All pairs of steps and all pairs of heads, averaged.

    Args:
        recorded: bool [steps, layers, heads, n, n] of each document; n may differ.
        block_size: tokens of a block.
    """
    found = []
    for layer in range(recorded[0].shape[1]):
        patterns = [r[:, layer] for r in recorded]
        density = sum(float(p.float().mean()) for p in patterns) / len(patterns)
        of_steps = _mean([_dice(p.flatten(1)) for p in patterns])
        of_heads = _mean([_dice(step.flatten(1)) for p in patterns for step in p])
        for kind, matrix in (("steps", of_steps), ("heads", of_heads)):
            found += [
                Overlap(kind, block_size, layer, a, b, round(value, 4), round(density, 4))
                for a, row in enumerate(matrix.tolist())
                for b, value in enumerate(row)
            ]
    return found


def _dice(patterns: Tensor) -> Tensor:
    """bool [patterns, blocks] -> float32 [patterns, patterns]."""
    kept = patterns.float()
    both = kept @ kept.T
    sizes = both.diagonal()
    return 2 * both / (sizes[:, None] + sizes)


def _mean(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).mean(dim=0)


def write_overlaps(path: Path, rows: Iterable[Overlap]) -> None:
    with path.open("w", newline="") as file:
        names = [field.name for field in fields(Overlap)]
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_overlaps(path: Path) -> list[Overlap]:
    """What `write_overlaps` wrote."""
    with path.open(newline="") as file:
        return [
            Overlap(
                kind=row["kind"],
                **{name: int(row[name]) for name in ("block_size", "layer", "first", "second")},
                overlap=float(row["overlap"]),
                density=float(row["density"]),
            )
            for row in csv.DictReader(file)
        ]
