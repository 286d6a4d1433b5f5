"""The least time of a short step: its matrix products alone, and reading the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.measuring.timing import time_calls

_COPY_BYTES: Final = 2 * 2**30
"""Size of the tensor whose copy tells the memory's bandwidth: far more than any cache."""

_BUDGET_MS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Floor:
    """Of one forward pass and the logits of some rows.

    Attributes:
        products_ms: all linear layers back to back, launched together; each reads its weights.
        read_ms: weights divided by the bandwidth of a copy.
        weights_gib: bytes of these weights.
        bandwidth_gbps: GB/s that a copy reads and writes.
    """

    products_ms: float
    read_ms: float
    weights_gib: float
    bandwidth_gbps: float


@torch.inference_mode()
def measure_floor(model: Any, num_tokens: int, num_rows: int) -> Floor:
    """Measure on the device of a model of this package.

    Args:
        model: as the model runner has it.
        num_tokens: of the pass.
        num_rows: that need logits.

    Raises:
        ValueError: the model has experts.
    """
    layers = model.model.layers
    if not hasattr(layers[0].mlp, "down_proj"):
        raise ValueError("--floor is for models without experts: which of them a row takes varies")
    weight = model.lm_head.weight
    device, dtype = weight.device, model.model.norm.weight.dtype

    def inputs(tokens: int, size: int) -> torch.Tensor:
        return torch.randn(tokens, size, device=device, dtype=torch.float32).to(dtype)

    hidden = inputs(num_tokens, weight.shape[1])
    attended = inputs(num_tokens, layers[0].self_attn.o_proj.input_size_per_partition)
    gated = inputs(num_tokens, layers[0].mlp.down_proj.input_size_per_partition)
    rows = inputs(num_rows, weight.shape[1])
    residual = torch.zeros_like(hidden)

    def products() -> None:
        for layer in layers:
            layer.self_attn.qkv_proj(hidden)
            layer.self_attn.o_proj.add_to(residual, attended)
            layer.mlp.gate_up_proj(hidden)
            layer.mlp.down_proj.add_to(residual, gated)
        model.compute_logits(rows)

    num_bytes = weight.nbytes + sum(
        parameter.nbytes for name, parameter in layers.named_parameters() if "proj" in name
    )
    products_ms = time_calls(_launched_together(products, device), device.type, _BUDGET_MS).p50
    source = torch.ones(_COPY_BYTES if device.type == "cuda" else 2**24, dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    copy_ms = time_calls(lambda: target.copy_(source), device.type, _BUDGET_MS).p50
    bandwidth = 2 * source.nbytes / copy_ms / 1e6
    return Floor(products_ms, num_bytes / bandwidth / 1e6, num_bytes / 2**30, bandwidth)


def _launched_together(run: Callable[[], None], device: torch.device) -> Callable[[], object]:
    """The same kernels without the host's time to launch them, on CUDA."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
