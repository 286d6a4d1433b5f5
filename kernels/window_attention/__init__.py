"""Attention of windows of few rows over the stored keys and values of their sequences."""

from vllm_sparsed.kernels.window_attention.torch_path import window_attention_torch
from vllm_sparsed.kernels.window_attention.window_tiles import (
    MAX_SPLITS,
    Window,
    WindowTiles,
    num_tiles_bound,
)
from vllm_sparsed.kernels.window_attention.wrapper import (
    warm_up,
    window_attention,
    workspace_bytes,
)

__all__ = [
    "MAX_SPLITS",
    "Window",
    "WindowTiles",
    "num_tiles_bound",
    "warm_up",
    "window_attention",
    "window_attention_torch",
    "workspace_bytes",
]
