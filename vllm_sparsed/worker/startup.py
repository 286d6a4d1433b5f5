"""What a worker does between loading the model and serving: measure memory, compile kernels."""

import gc
import time
from typing import Any, Final

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.utils.mem_utils import MemorySnapshot, format_gib

from vllm_sparsed.attention.metadata import SequencePhase
from vllm_sparsed.attention.pages import PAGE_SIZE, split_pages
from vllm_sparsed.decoding.algorithms import ALGORITHMS
from vllm_sparsed.kernels import block_sparse_attention, pattern_building, window_attention
from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES
from vllm_sparsed.logger import init_logger
from vllm_sparsed.worker.cuda_graphs import MAX_GRAPHS, PassGraphs
from vllm_sparsed.worker.decoding_warm_up import Asked, candidates_of, warm_up_decoding
from vllm_sparsed.worker.memory_errors import ADVICE, StartupError, fits_in_memory
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.packing import PackedBatch

logger = init_logger(__name__)

_CPU_SEQUENCE: Final = 1024
"""Sequence length of the memory measurement on CPUs, where attention needs no memory of its own
but a full-length pass would take minutes."""


def measure_memory(
    runner: DenoisingModelRunner,
    limit_bytes: int | None,
    baseline: MemorySnapshot | None = None,
    context_bytes: int = 0,
) -> int:
    """Run the largest batch the scheduler may form and compare what the process takes with a limit.

    That is what PyTorch holds at the peak, the parts of its blocks that lie idle included, what
    libraries and collectives have taken beside it, and the process's context.

    Args:
        runner: with its model loaded and its pattern store allocated.
        limit_bytes: memory that this worker may take, weights included; None: no limit but the
            machine's.
        baseline: vLLM's snapshot of the device, before the model was loaded.
        context_bytes: what the process had taken by then.

    Returns:
        Peak bytes on the device, what all CUDA graphs may take included (0 on CPUs, where nobody
        counts them).

    Raises:
        StartupError: the batch does not fit.
    """
    on_device = runner.device.type != "cpu"
    if on_device:
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()
    batch = f"A full batch of max_num_batched_tokens={runner.settings.max_batch_tokens} tokens"
    graph_bytes = held = 0
    with fits_in_memory(batch):
        _largest_batch(runner)
        if on_device:
            torch.accelerator.synchronize()
            held = torch.accelerator.max_memory_reserved()
        if runner.graphs is not None:
            graph_bytes = _record_largest_pass(runner, runner.graphs)
    if not on_device:
        return 0
    torch.accelerator.empty_cache()
    outside = context_bytes
    if baseline is not None:
        now = MemorySnapshot(device=baseline.device)
        # What the graphs take outside PyTorch is counted with them.
        outside += max(0, now.non_torch_memory - baseline.non_torch_memory)
    peak = held + graph_bytes + outside
    logger.info(
        "Peak memory of a full batch of %d tokens: %s GiB (weights %s GiB, pattern store %s GiB, "
        "CUDA graphs %s GiB, context, libraries and collectives %s GiB)",
        runner.settings.max_batch_tokens,
        format_gib(peak),
        format_gib(runner.model_memory_usage),
        format_gib(runner.store.num_bytes if runner.store else 0),
        format_gib(graph_bytes),
        format_gib(outside),
    )
    if limit_bytes is not None and peak > limit_bytes:
        needs = f"needs {format_gib(peak)} GiB of {format_gib(limit_bytes)} GiB allowed"
        raise StartupError(f"{batch} {needs}. {ADVICE}")
    return peak


def _largest_batch(runner: DenoisingModelRunner) -> None:
    """A full batch of which one of the longest sequences builds its patterns: layers take their
    sequences one by one, so more that build would need no more."""
    settings = runner.settings
    total = settings.max_batch_tokens
    longest = settings.max_model_len
    if runner.device.type == "cpu":
        longest = min(longest, _CPU_SEQUENCE)
    lengths = _lengths(total, longest)
    phases = [SequencePhase(canvas_len=length) for length in lengths]
    pattern_rows: list[int] = []
    if runner.store is not None:
        block_size, select = settings.server.defaults.pattern_settings(longest)
        pattern_rows = runner.store.allocate(-(-longest // block_size))
        phases[-1] = SequencePhase(
            canvas_len=min(longest, settings.server.sparsed_max_canvas or longest),
            block_size=block_size,
            select=select,
            builds=True,
            pattern_rows=pattern_rows,
        )
    # Where the halves of guided requests take turns, the first ones' hidden states and room for the
    # others' are kept while these run.
    kept = torch.empty(
        (2 * total, runner.model_config.get_hidden_size()),
        dtype=runner.model_config.dtype,
        device=runner.device,
    )
    try:
        output = _run(runner, runner.packer.batch(lengths, phases))
    finally:
        del kept
        if runner.store is not None:
            runner.store.release(pattern_rows)

    # Every position may be a candidate; two chunks of logits show the peak of any number of them.
    hidden = output[torch.arange(total, device=runner.device)]
    num_rows = min(total, 2 * runner.max_chunk_rows)
    hidden = hidden[:num_rows]
    # Every option that takes memory: guidance, sampling, top-p, top-k and entropy.
    costliest = Asked(
        ALGORITHMS["entropy"].ranking, temperature=1.0, top_p=0.9, top_k=50, cfg_scale=1.0
    )
    runner.decoder.decode(
        candidates_of(costliest, number=num_rows), hidden, hidden, runner.model.compute_logits
    )


def _lengths(total: int, longest: int) -> list[int]:
    """Sequences of so many tokens in all, the longest ones last."""
    return ([total % longest] if total % longest else []) + [longest] * (total // longest)


def _run(runner: DenoisingModelRunner, batch: PackedBatch) -> torch.Tensor:
    mask = runner.settings.mask_token_id
    token_ids = torch.full((batch.num_tokens,), mask, dtype=torch.int32)
    return runner.run_model(token_ids.to(runner.device), batch.positions, batch.attention)


def _record_largest_pass(runner: DenoisingModelRunner, graphs: PassGraphs) -> int:
    """Record the largest passes.

    Returns:
        Bytes that all graphs together may take: the activations that they share, which no other
        pass can use, and what each takes outside PyTorch's allocator.
    """
    total = min(graphs.max_tokens, runner.settings.max_batch_tokens)
    reserved = []
    outside = []
    # The first graph pays for what all share. Of the others the smallest counts: another process on
    # the device may take memory meanwhile.
    for num_tokens in range(total, max(0, total - 4), -1):
        lengths = _lengths(num_tokens, min(num_tokens, runner.settings.max_model_len))
        batch = runner.packer.batch(lengths, [SequencePhase(canvas_len=n) for n in lengths])
        _run(runner, batch)
        before = _device_bytes()
        graphs.capture(batch)
        after = _device_bytes()
        reserved.append(after[0] - before[0])
        outside.append(after[1] - before[1])
    each = max(0, min(outside[1:], default=0))
    return max(0, sum(reserved)) + MAX_GRAPHS * each


def _device_bytes() -> tuple[int, int]:
    """Bytes that PyTorch's allocator holds, and those taken beside it, by whomever."""
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return reserved, int(total - free - reserved)


def compile_kernels(runner: DenoisingModelRunner) -> None:
    """Compile what the steps of any request will call (CUDA only): no request waits for that.

    FlashAttention 4, where requests are to use it, is also compared with this package's kernel: it
    is called by names that another version of vLLM may change.
    """
    if runner.device.type == "cpu":
        return
    started = time.perf_counter()
    count = warm_up_decoding(
        runner.decoder,
        runner.model_config.get_hidden_size(),
        runner.model_config.dtype,
        runner.model.compute_logits,
    )
    torch.accelerator.synchronize()
    seconds = time.perf_counter() - started
    logger.info("Compiled the decoding kernels in %.1f s (%d kinds of steps)", seconds, count)
    if runner.store is None:
        return
    started = time.perf_counter()
    layer = next(iter(get_layers_from_vllm_config(runner.vllm_config, Attention).values()))
    for warm_up in (block_sparse_attention.warm_up, pattern_building.warm_up):
        warm_up(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_size,
            dtype=runner.model_config.dtype,
            block_sizes=BLOCK_SIZES,
            device=runner.device,
            index_dtype=runner.store.indices.dtype,
        )
    logger.info("Compiled the sparse kernels in %.1f s", time.perf_counter() - started)
    check_flash_attention_4(runner, layer)


def check_flash_attention_4(runner: DenoisingModelRunner, layer: Any) -> None:
    """Let FlashAttention 4 attend where it is to, once it has been compared with our kernel.

    Args:
        runner: with its pattern store allocated.
        layer: any attention layer of the model.
    """
    settings = runner.settings
    fa4 = settings.crossover.costs.fa4 if settings.crossover else None
    if fa4 is None or settings.max_model_len < fa4.min_tokens:
        return
    assert runner.store is not None
    started = time.perf_counter()
    try:
        # Compiles it as well, which takes seconds: no request waits for that.
        flash_attention_4.check(
            layer.num_heads,
            layer.num_kv_heads,
            runner.model_config.dtype,
            width=runner.store.size.width,
            index_dtype=runner.store.indices.dtype,
            device=runner.device,
        )
    except Exception as error:
        # Packages fail to import, compile or run in many ways; ours serves every request.
        logger.warning("FlashAttention 4 is installed but not used: %s", error)
        return
    runner.packer.use_flash_attention_4(fa4)
    logger.info(
        "FlashAttention 4 attends for sparse requests of %d to %d tokens, blocks of %d; compiled "
        "in %.1f s",
        fa4.min_tokens,
        fa4.max_tokens,
        fa4.block_size,
        time.perf_counter() - started,
    )


def compile_window_kernels(runner: DenoisingModelRunner) -> None:
    """Compile what window passes will call, on the pages that they will read (CUDA only)."""
    if not runner.kv_caches or runner.device.type == "cpu":
        return
    started = time.perf_counter()
    layer = next(iter(get_layers_from_vllm_config(runner.vllm_config, Attention).values()))
    keys, values = split_pages(layer.kv_cache, layer.head_size)
    window_attention.warm_up(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_size,
        dtype=runner.model_config.dtype,
        # Windows without patterns count as those with the largest blocks.
        block_sizes=sorted({*BLOCK_SIZES, PAGE_SIZE}),
        k_pages=keys,
        v_pages=values,
        index_dtype=torch.int16 if runner.store is None else runner.store.indices.dtype,
        device=runner.device,
    )
    logger.info("Compiled the window kernels in %.1f s", time.perf_counter() - started)
