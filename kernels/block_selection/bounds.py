"""How many key blocks are kept."""


def kept_columns(num_columns: int, select: float) -> int:
    """How many of so many columns are kept: max(1, int(n * select) + 1), never more than n."""
    return min(num_columns, max(1, int(num_columns * select) + 1))
