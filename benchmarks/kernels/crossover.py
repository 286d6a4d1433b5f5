"""Measures from which length on sparse attention pays, and fits the costs that decide it.

    python -m benchmarks.kernels.crossover

Runs one attention layer as the engine does: dense steps, sparse steps, and the step that builds the
pattern. Prints every time beside its prediction and the entry of
vllm_sparsed/planning/kernel_costs.py that was fitted; on a device of another kind that entry is
what the table lacks. The kernels are checked before they are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from vllm.v1.attention.backend import AttentionType

from benchmarks.kernels.cost_fit import Measured, fit, source
from benchmarks.measuring.timing import synchronize
from vllm_sparsed.attention.implementation import SparsedAttentionImpl
from vllm_sparsed.attention.metadata import PatternBuild, SparsedMetadata
from vllm_sparsed.attention.pattern_store import PatternStore, PatternStoreSize
from vllm_sparsed.kernels.block_sparse_attention import QueryTiles
from vllm_sparsed.kernels.pattern_building import pattern_width
from vllm_sparsed.planning.crossover import AttentionCosts, Crossover, keys_scored

CANVAS: Final = 128
SELECT: Final = 0.3
STEPS: Final = 32
CHECKED_ROWS: Final = 16
LONGEST_CHECKED: Final = 4096
BUDGET_S: Final = 0.03
MOST_CALLS: Final = 500

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Layer:
    """One attention layer over one sequence of random values."""

    def __init__(
        self,
        length: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        kv_heads: int | None = None,
    ) -> None:
        kv_heads = heads if kv_heads is None else kv_heads
        self.shared = heads // kv_heads
        self.length, self.heads, self.head_dim = length, heads, head_dim
        self.device = torch.device(device)
        qkv = torch.randn(length, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
        self.q, self.k, self.v = qkv.split([heads, kv_heads, kv_heads], dim=1)
        self.out = torch.empty(length, heads, head_dim, dtype=dtype, device=device)
        self.attention = SparsedAttentionImpl(
            heads, head_dim, head_dim**-0.5, kv_heads, attn_type=AttentionType.ENCODER_ONLY
        )

    def run(self, metadata: SparsedMetadata) -> Tensor:
        layer: Any = SimpleNamespace(layer_index=0)
        no_cache = torch.empty(0)
        return self.attention.forward(layer, self.q, self.k, self.v, no_cache, metadata, self.out)

    def dense(self) -> SparsedMetadata:
        bounds = torch.tensor([0, self.length], dtype=torch.int32, device=self.device)
        return SparsedMetadata(self.length, ((0, self.length),), bounds, self.length, (), (), None)

    def building(self, block_size: int, canvas: int) -> SparsedMetadata:
        """A dense pass that builds the pattern, too."""
        num_blocks = -(-self.length // block_size)
        width = pattern_width(num_blocks, -(-canvas // block_size), SELECT)
        store = PatternStore(PatternStoreSize(num_blocks, width), 1, self.heads, self.device)
        rows = torch.arange(num_blocks, dtype=torch.int32, device=self.device)
        build = PatternBuild(0, self.length, canvas, block_size, SELECT, rows)
        dense = self.dense()
        return SparsedMetadata(
            self.length,
            dense.dense_bounds,
            dense.dense_start_loc,
            self.length,
            (build,),
            (),
            store,
        )

    def sparse(self, building: SparsedMetadata) -> SparsedMetadata:
        """A pass over the pattern that `building` left in its store."""
        block_size = building.builds[0].block_size
        num_blocks = -(-self.length // block_size)
        tiles = QueryTiles.build([0], [self.length], [range(num_blocks)], block_size, self.device)
        nothing = torch.zeros(1, dtype=torch.int32, device=self.device)
        return SparsedMetadata(self.length, (), nothing, 0, (), (tiles,), building.store)

    def check(self, metadata: SparsedMetadata) -> None:
        """Compare some rows with float64.

        Raises:
            RuntimeError: they are further away than rounding explains.
        """
        self.out.fill_(float("nan"))
        out = self.run(metadata)
        rows = torch.randperm(self.length, device=self.device)[:CHECKED_ROWS]
        error = largest = 0.0
        for head in range(self.heads):
            scores = self.q[rows, head].double() @ self.k[:, head // self.shared].double().T
            scores *= self.attention.scale
            if metadata.tiles:
                kept = _kept_keys(metadata, rows, head, self.length)
                scores.masked_fill_(~kept, float("-inf"))
            exact = torch.softmax(scores, dim=-1) @ self.v[:, head // self.shared].double()
            error = max(error, (out[rows, head].double() - exact).abs().max().item())
            largest = max(largest, exact.abs().max().item())
        roundings = 32 if self.q.dtype == torch.float32 else 4
        if not error <= roundings * torch.finfo(self.q.dtype).eps * largest:
            raise RuntimeError(f"wrong result at {self.length} tokens: error {error:.2e}")


def _kept_keys(metadata: SparsedMetadata, rows: Tensor, head: int, length: int) -> Tensor:
    """bool [rows, length]: the keys that the pattern keeps for these queries."""
    store, (tiles,) = metadata.store, metadata.tiles
    assert store is not None
    block_size = tiles.block_size
    blocks = torch.div(rows, block_size, rounding_mode="floor")
    kept = torch.zeros(len(rows), tiles.num_rows, dtype=torch.bool, device=rows.device)
    for i, block in enumerate(blocks.tolist()):
        count = int(store.counts[0, block, head])
        kept[i, store.indices[0, block, head, :count].long()] = True
    return kept.repeat_interleave(block_size, dim=1)[:, :length]


def time_call(run: Callable[[], object], device: str) -> float:
    """Milliseconds of a call among others of its kind, as layers follow each other in a step.

    Where the host takes longer to launch than the device to compute, this is the host's time.
    """
    run()
    calls = 1
    while True:
        seconds = _time_calls(run, calls, device)
        if seconds > BUDGET_S or calls >= MOST_CALLS:
            return seconds / calls * 1e3
        calls = min(MOST_CALLS, max(2 * calls, int(calls * BUDGET_S / max(seconds, 1e-6))))


def _time_calls(run: Callable[[], object], calls: int, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return time.perf_counter() - started


def measure(
    layer: Layer, block_sizes: Sequence[int], canvas: int, lse_given: bool
) -> Iterator[Measured]:
    """Dense and sparse attention and pattern building over one sequence, checked and timed."""
    length, device = layer.length, layer.device.type
    rows = length * layer.heads
    product = 2.0 * rows * layer.head_dim
    dense = layer.dense()
    check = length <= LONGEST_CHECKED
    if check:
        layer.check(dense)
    dense_ms = time_call(partial(layer.run, dense), device)
    yield Measured("dense", 0, length, dense_ms, rows, 2 * product * length)
    for block_size in block_sizes:
        building = layer.building(block_size, canvas)
        layer.run(building)
        sparse = layer.sparse(building)
        if check:
            layer.check(sparse)
        store = building.store
        assert store is not None
        kept = float(store.counts.sum(dtype=torch.int64)) / layer.heads * block_size**2
        scored = keys_scored(length, canvas, block_size, lse_given)
        building_ms = time_call(partial(layer.run, building), device)
        build_ms = max(building_ms - dense_ms, 0.0)
        yield Measured("build", block_size, length, build_ms, rows, product * scored)
        sparse_ms = time_call(partial(layer.run, sparse), device)
        flops = 4.0 * kept * layer.heads * layer.head_dim
        yield Measured("sparse", block_size, length, sparse_ms, rows, flops)


@contextlib.contextmanager
def kernels_of(capability: tuple[int, int] | None) -> Iterator[None]:
    """Run the kernels and tiles of an older chip, and PyTorch's FlashAttention 2."""
    if capability is None:
        yield
        return
    from triton.runtime import driver

    from vllm_sparsed.kernels.devices import capability_of

    driver.active.get_current_target()  # compiles for the chip that is there
    capability_of.cache_clear()
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        yield
    capability_of.cache_clear()


def report(
    measured: Sequence[Measured], costs: AttentionCosts, heads: int, head_dim: int, canvas: int
) -> list[str]:
    """A line per length and block size: measured and predicted times, and what is chosen."""
    crossover = Crossover(costs, heads, head_dim)
    times = {(m.kind, m.block_size, m.length): m.ms for m in measured}
    lines = [
        f"ms measured (predicted); faster and chosen for {STEPS} sparse steps; predictions are for "
        "patterns that keep as much as they can"
    ]
    for kind, block_size, length in times:
        if kind != "sparse":
            continue
        predicted = crossover.predict(length, canvas, block_size, SELECT)
        dense = times["dense", 0, length]
        sparse, build = times[kind, block_size, length], times["build", block_size, length]
        faster = "sparse" if build + STEPS * sparse < STEPS * dense else "dense"
        chosen = "sparse" if predicted.sparse_pays(STEPS) else "dense"
        lines.append(
            f"{length:6d} b{block_size:<4d}dense {dense:.4f} ({predicted.dense * 1e3:.4f})  "
            f"sparse {sparse:.4f} ({predicted.sparse * 1e3:.4f})  "
            f"build {build:.4f} ({predicted.build * 1e3:.4f})  faster {faster}, chosen {chosen}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    lengths = [256, 512, 1024, 2048, 4096, 8192, 16384]
    add("--lengths", type=int, nargs="+", default=lengths, help="tokens of the sequence")
    add("--block-sizes", type=int, nargs="+", default=[16, 32, 64, 128], choices=(16, 32, 64, 128))
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, help="key heads, which query heads share; default: --heads")
    add("--head-dim", type=int, default=128)
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--capability", help="e.g. 8.0: the kernels of that chip and FlashAttention 2, run here")
    add("--small", action="store_true", help="a short form for CPUs")
    options = parser.parse_args(arguments)
    if options.small:
        options.lengths, options.block_sizes = [128, 256, 512], [32, 64]
        options.heads, options.head_dim, options.dtype = 2, 32, "float32"
    major, _, minor = (options.capability or "").partition(".")
    capability = (int(major), int(minor or 0)) if major else None
    # Without vLLM's FlashAttention pattern building computes the log-sum-exp itself.
    lse_given = options.device == "cuda" and capability is None and options.dtype != "float32"
    canvas = min(CANVAS, *options.lengths)
    torch.manual_seed(0)
    measured: list[Measured] = []
    with kernels_of(capability):
        for length in options.lengths:
            layer = Layer(
                length,
                options.heads,
                options.head_dim,
                DTYPES[options.dtype],
                options.device,
                options.kv_heads,
            )
            if capability is not None:
                layer.attention._flash_version = None
            measured += measure(layer, options.block_sizes, canvas, lse_given)
    costs = fit(measured, lse_given)
    print("\n".join(report(measured, costs, options.heads, options.head_dim, canvas)))
    print(source(costs))


if __name__ == "__main__":
    main()
