"""How many masks a step decides: LLaDA's even shares and Dream's schedule of times."""

from functools import lru_cache

import numpy as np
import torch


def even_share(masks_at_start: int, step: int, steps: int) -> int:
    """LLaDA: an even share of the block's masks, one more in each of the first steps.

    Args:
        masks_at_start: masks of the block when its first step begins.
        step: 0-based step within the block, of `steps`.
    """
    share, remainder = divmod(masks_at_start, steps)
    return share + (step < remainder)


def timestep_share(masks_left: int, step: int, steps: int, eps: float) -> int:
    """Dream: int(m * (1 - times[i + 1] / times[i])) of the m masks left, all in the last step."""
    if step >= steps - 1:
        return masks_left
    # float32 like the reference's 0-dim tensors: float64 rounds some products down differently.
    return int(np.float32(masks_left) * _unmask_fractions(steps, eps)[step])


def timestep_probability(step: int, steps: int, eps: float) -> float:
    """Dream's `origin`: 1 - times[i + 1] / times[i], in the last step 1."""
    if step >= steps - 1:
        return 1.0
    return float(_unmask_fractions(steps, eps)[step])


@lru_cache(maxsize=256)
def _unmask_fractions(steps: int, eps: float) -> np.ndarray:
    """1 - times[i + 1] / times[i] for times = linspace(1, eps, steps + 1); float32 [steps]."""
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float32, device="cpu").numpy()
    return np.float32(1) - times[1:] / times[:-1]
