"""Rotary embedding in plain PyTorch."""

import torch
from torch import Tensor


def rotary_embedding_reference(positions: Tensor, x: Tensor, cos_sin: Tensor) -> Tensor:
    """x with its heads rotated (Su et al., arXiv 2104.09864, halves instead of neighbours).

    Element d of a head pairs with d + head_dim / 2. Computed in the wider dtype of x and cos_sin,
    rounded once.

    Args:
        positions: integer [tokens].
        x: [tokens, heads * head_dim].
        cos_sin: [positions, head_dim], cosines then sines.
    """
    head_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    dtype = torch.promote_types(x.dtype, cos_sin.dtype)
    first, second = x.unflatten(1, (-1, head_dim)).to(dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(1).to(x.dtype)
