"""The decision in plain Python, request by request."""

from collections.abc import Sequence


def decide_rows_reference(
    candidates: Sequence[int],
    confidences: Sequence[float],
    first_row: Sequence[int],
    num_to_unmask: Sequence[int],
    passes: Sequence[bool] | None = None,
) -> list[int]:
    """The candidate of each row that is unmasked, -1 for the others.

    Args:
        candidates, confidences: of the rows; a confidence that is not a number is the highest.
        first_row: [requests + 1], where each request's rows begin, and their number.
        num_to_unmask: [requests], how many of its most confident rows are considered, the first
            ones among equals.
        passes: whether a considered row is unmasked; None: all are.
    """
    decided = [-1] * len(candidates)
    for request, count in enumerate(num_to_unmask):
        rows = range(first_row[request], first_row[request + 1])
        # NaN differs from itself.
        ranked = sorted(rows, key=lambda r: (confidences[r] == confidences[r], -confidences[r], r))
        for row in ranked[:count]:
            if passes is None or passes[row]:
                decided[row] = candidates[row]
    return decided
