"""CPU serving path of the rotary embedding."""

from torch import Tensor


def rotate_torch(positions: Tensor, x: Tensor, cos_sin: Tensor) -> None:
    """Rotate x [tokens, heads * head_dim] in place; arguments as those of `rotary_embedding`."""
    head_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions][:, None].chunk(2, dim=-1)
    heads = x.unflatten(1, (-1, head_dim))
    first, second = heads.float().chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    for half, values in zip(heads.chunk(2, dim=-1), rotated, strict=True):
        half.copy_(values)
