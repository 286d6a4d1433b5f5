"""One attention layer's forward pass: the dense span, pattern building, the sparse sequences."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_sparsed.attention.metadata import SparsedMetadata
from vllm_sparsed.kernels.block_sparse_attention import block_sparse_attention
from vllm_sparsed.kernels.block_sparse_attention.flash_attention_4 import flash_attention_4
from vllm_sparsed.kernels.pattern_building import build_pattern


class PatternBuilder(Protocol):
    """Stores the pattern of one sequence and layer; arguments as those of `build_pattern`."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        *,
        canvas_len: int,
        block_size: int,
        select: float,
        scale: float,
        lse: torch.Tensor | None,
        pattern_rows: torch.Tensor,
        indices: torch.Tensor,
        counts: torch.Tensor,
    ) -> None: ...


class SparsedAttentionImpl(AttentionImpl[SparsedMetadata]):
    """Bidirectional attention over the sequences of a batch, each in its own phase.

    Dense sequences run through vLLM's FlashAttention in float16 and bfloat16 on CUDA and through
    PyTorch's scaled dot-product attention in float32 and on CPUs; sparse ones through the Triton
    kernel on CUDA and the PyTorch path that touches only kept blocks on CPUs, or through
    FlashAttention 4 where the metadata says so.

    Attributes:
        build_pattern: SparseD's; experiments may put another in its place.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        """Raises ValueError where a model asks for an attention that SparseD does not define."""
        refused = {
            f"attention type {attn_type}": attn_type != AttentionType.ENCODER_ONLY,
            "alibi_slopes": alibi_slopes is not None,
            "sliding_window": sliding_window is not None,
            "logits_soft_cap": bool(logits_soft_cap),
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in extra.items()},
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(
                    f"--attention-backend sparsed serves bidirectional diffusion language models: "
                    f"it does not support {name}."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.build_pattern: PatternBuilder = build_pattern
        self._flash_version = _flash_attention_version(head_size)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparsedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            layer: the attention layer; its `layer_index` selects the patterns.
            query: [tokens, query heads, head_size], after rotary embedding.
            key: [tokens, key heads, head_size], after rotary embedding.
            value: [tokens, key heads, head_size].
            kv_cache: unused, there is none.
            attn_metadata: None while vLLM measures memory without a batch.
            output: [tokens, query heads, head_size], written in place.
            output_scale: must be None (no fused output quantisation).
            output_block_scale: must be None.

        Returns:
            `output`.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by SPARSED")
        if attn_metadata is None:
            return output.zero_()
        metadata = attn_metadata
        if metadata.dense_bounds:
            lse = self._attend_densely(query, key, value, metadata, output)
            self._build_patterns(layer, query, key, metadata, lse)
        if metadata.tiles or metadata.fa4_sequences:
            assert metadata.store is not None
            index: int = layer.layer_index
            for tiles in metadata.tiles:
                block_sparse_attention(
                    query,
                    key,
                    value,
                    metadata.store.indices[index],
                    metadata.store.counts[index],
                    tiles,
                    scale=self.scale,
                    out=output,
                )
            for sequence in metadata.fa4_sequences:
                span = slice(sequence.start, sequence.end)
                flash_attention_4(
                    query[span],
                    key[span],
                    value[span],
                    metadata.store.indices[index],
                    metadata.store.counts[index],
                    sequence.pattern_rows,
                    scale=self.scale,
                    out=output[span],
                )
        return output

    def _attend_densely(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        metadata: SparsedMetadata,
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        """Full attention over the dense span.

        Returns:
            The log-sum-exp of every row, float32 [query heads, tokens], where a pattern is built
            and FlashAttention gives it; else None.
        """
        if self._flash_version is None or query.dtype == torch.float32:
            grouped = self.num_heads != self.num_kv_heads
            # In float32 PyTorch has no kernel for grouped heads on CUDA but the one that writes out
            # all scores, which are the square of the length.
            repeats = self.num_heads // self.num_kv_heads if query.dtype == torch.float32 else 1
            for start, end in metadata.dense_bounds:
                output[start:end] = F.scaled_dot_product_attention(
                    query[start:end].transpose(0, 1)[None],
                    _repeat_heads(key[start:end], repeats),
                    _repeat_heads(value[start:end], repeats),
                    scale=self.scale,
                    enable_gqa=grouped and repeats == 1,
                )[0].transpose(0, 1)
            return None
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        span = slice(0, metadata.num_dense_tokens)
        result = flash_attn_varlen_func(
            q=query[span],
            k=key[span],
            v=value[span],
            out=output[span],
            cu_seqlens_q=metadata.dense_start_loc,
            cu_seqlens_k=metadata.dense_start_loc,
            max_seqlen_q=metadata.max_dense_len,
            max_seqlen_k=metadata.max_dense_len,
            softmax_scale=self.scale,
            causal=False,
            return_softmax_lse=bool(metadata.builds),
            fa_version=self._flash_version,
        )
        return result[1] if metadata.builds else None

    def _build_patterns(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        metadata: SparsedMetadata,
        lse: torch.Tensor | None,
    ) -> None:
        for build in metadata.builds:
            assert metadata.store is not None
            span = slice(build.start, build.end)
            index: int = layer.layer_index
            self.build_pattern(
                query[span],
                key[span],
                canvas_len=build.canvas_len,
                block_size=build.block_size,
                select=build.select,
                scale=self.scale,
                lse=None if lse is None else lse[:, span],
                pattern_rows=build.pattern_rows,
                indices=metadata.store.indices[index],
                counts=metadata.store.counts[index],
            )


def _repeat_heads(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """[tokens, heads, head_size] to [1, heads * repeats, tokens, head_size]: each head so often."""
    x = x.transpose(0, 1)
    return (x if repeats == 1 else x.repeat_interleave(repeats, dim=0))[None]


def _flash_attention_version(head_size: int) -> int | None:
    """Version of vLLM's FlashAttention for this device, None where there is none."""
    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_size)
