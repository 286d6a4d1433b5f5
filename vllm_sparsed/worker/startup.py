"""What a worker does between loading the model and serving: measure memory, compile kernels."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from vllm.utils.mem_utils import format_gib

from vllm_sparsed.decoding.batch_decoder import DecodeRows
from vllm_sparsed.kernels import block_sparse_attention, pattern_building
from vllm_sparsed.logger import init_logger

if TYPE_CHECKING:
    from vllm_sparsed.worker.model_runner import DenoisingModelRunner

logger = init_logger(__name__)

_CPU_SEQUENCE: Final = 1024
"""Sequence length of the memory measurement on CPUs, where attention needs no memory of its own
but a full-length pass would take minutes."""


_ADVICE: Final = (
    "Lower --max-model-len and --max-num-batched-tokens, raise --gpu-memory-utilization, add "
    "--tensor-parallel-size or --quantization fp8, or make the pattern store smaller "
    "(sparsed.select, sparsed.max_canvas, a larger sparsed.block_size)."
)


class StartupError(RuntimeError):
    """The configuration cannot run on this machine; says what to change."""


def measure_memory(runner: DenoisingModelRunner, limit_bytes: int | None) -> int:
    """Run the largest batch the scheduler may form and compare its peak with the limit.

    Args:
        runner: with its model loaded and its pattern store allocated.
        limit_bytes: memory that this worker may take, weights included; None: no limit but the
            machine's.

    Returns:
        Peak bytes allocated on the device (0 on CPUs, where nobody counts them).

    Raises:
        StartupError: the batch does not fit.
    """
    on_device = runner.device.type != "cpu"
    if on_device:
        torch.accelerator.reset_peak_memory_stats()
    batch = f"A full batch of max_num_batched_tokens={runner.settings.max_batch_tokens} tokens"
    with fits_in_memory(batch):
        _largest_batch(runner)
    if not on_device:
        return 0
    torch.accelerator.synchronize()
    peak = torch.accelerator.max_memory_allocated()
    torch.accelerator.empty_cache()
    logger.info(
        "Peak memory of a full batch of %d tokens: %s GiB (weights %s GiB, pattern store %s GiB)",
        runner.settings.max_batch_tokens,
        format_gib(peak),
        format_gib(runner.model_memory_usage),
        format_gib(runner.store.num_bytes if runner.store else 0),
    )
    if limit_bytes is not None and peak > limit_bytes:
        needs = f"needs {format_gib(peak)} GiB of {format_gib(limit_bytes)} GiB allowed"
        raise StartupError(f"{batch} {needs}. {_ADVICE}")
    return peak


@contextlib.contextmanager
def fits_in_memory(what: str) -> Iterator[None]:
    """Say what to change where the block runs out of memory.

    Raises:
        StartupError: it did; names `what` as that which does not fit.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(f"{what} does not fit in memory. {_ADVICE}") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise StartupError(f"{what} does not fit in memory. {_ADVICE}") from error


def _largest_batch(runner: DenoisingModelRunner) -> None:
    settings = runner.settings
    total = settings.max_batch_tokens
    longest = settings.max_model_len
    if runner.device.type == "cpu":
        longest = min(longest, _CPU_SEQUENCE)
    lengths = [longest] * (total // longest) + ([total % longest] if total % longest else [])
    token_ids = torch.full((total,), settings.mask_token_id, dtype=torch.int32)
    positions, attention = runner.packer.dense_batch(lengths)
    output = runner.run_model(token_ids.to(runner.device), positions, attention)

    # Every position may be a candidate; two chunks of logits show the peak of any number of them.
    hidden = output[torch.arange(total, device=runner.device)]
    num_rows = min(total, 2 * runner.max_chunk_rows)
    rows = _costliest_rows(num_rows)
    hidden = hidden[:num_rows]
    runner.decoder.decode(rows, hidden, hidden, runner.model.compute_logits)


def _costliest_rows(num_rows: int) -> DecodeRows:
    """One request with every option that takes memory: guidance, sampling, top-p and entropy."""

    def one(value: float, dtype: type) -> np.ndarray:
        return np.array([value], dtype=dtype)

    return DecodeRows(
        request=np.zeros(num_rows, dtype=np.int32),
        position=np.arange(num_rows, dtype=np.int32),
        algs=("entropy",),
        temperature=one(1.0, np.float64),
        top_p=one(0.9, np.float64),
        top_k=one(0, np.int64),
        alg_temp=one(0.0, np.float64),
        seed=one(0, np.int64),
        step=one(0, np.int64),
        num_to_unmask=one(1, np.int64),
        unmask_probability=one(1.0, np.float64),
        cfg_scale=one(1.0, np.float64),
        logits_eos_inf=one(0, np.bool_),
        confidence_eos_eot_inf=one(0, np.bool_),
    )


def compile_kernels(runner: DenoisingModelRunner) -> None:
    """Compile what the first pattern-building and sparse steps will call (CUDA only)."""
    if runner.store is None or runner.device.type == "cpu":
        return
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention

    started = time.perf_counter()
    layer = next(iter(get_layers_from_vllm_config(runner.vllm_config, Attention).values()))
    smallest = runner.store.size.block_size
    for warm_up in (block_sparse_attention.warm_up, pattern_building.warm_up):
        warm_up(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            dtype=runner.model_config.dtype,
            block_sizes=[size for size in (16, 32, 64, 128) if size >= smallest],
            device=runner.device,
            index_dtype=runner.store.indices.dtype,
        )
    logger.info("Compiled the sparse kernels in %.1f s", time.perf_counter() - started)
