"""The transformer that LLaDA and Dream share: pre-norm blocks, rotary embedding, SwiGLU."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion.quant_activation import QuantizedActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_sparsed.kernels.silu_and_mul import silu_and_mul
from vllm_sparsed.models.bidirectional_attention import BidirectionalAttention
from vllm_sparsed.models.checkpoint_weights import load_complete
from vllm_sparsed.models.fp8_rows import (
    accept_fp8_rows,
    gate_to_fp8,
    norm_to_fp8,
    takes_fp8_rows,
)
from vllm_sparsed.models.registry import MODELS
from vllm_sparsed.models.rotary import Rotary

STACKED_PROJECTIONS = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""Checkpoint projections that vLLM's layers hold in one matrix, and the part of it they fill."""


class ResidualRowParallelLinear(RowParallelLinear):
    """A projection back to the hidden size, which can add its product to the residual sum itself.

    Where it does, the sum is read and written by the matrix product (cuBLAS, beta = 1), rounded
    once, and one pass over the hidden states is saved. Quantized weights and sums over
    tensor-parallel ranks do not allow it. Quantizations find their layers by "Linear" in the
    class's name.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_plain_product: bool = (
            type(self.quant_method) is UnquantizedLinearMethod
            and self.tp_size == 1
            and self.bias is None
            and not envs.VLLM_BATCH_INVARIANT
            and get_current_vllm_config().kernel_config.linear_backend == "auto"
        )

    def add_to(
        self, residual: torch.Tensor, x: torch.Tensor | QuantizedActivation
    ) -> torch.Tensor | None:
        """Project x [tokens, input_size].

        Returns:
            What is still to be added to `residual` [tokens, hidden_size]; None where that is done,
            in place.
        """
        if isinstance(x, torch.Tensor) and x.is_cuda and self.is_plain_product:
            residual.addmm_(x, self.weight.t())
            return None
        output: torch.Tensor = self(x)[0]
        return output


def add_and_norm(
    norm: RMSNorm,
    pending: torch.Tensor | None,
    residual: torch.Tensor,
    consumer: LinearBase | None = None,
) -> tuple[torch.Tensor | QuantizedActivation, torch.Tensor]:
    """The norm of residual + pending, and that sum; both arguments may be overwritten.

    The norm is in fp8 where `consumer`, the layer that it is for, takes that.
    """
    if consumer is not None and takes_fp8_rows(consumer):
        return norm_to_fp8(norm, pending, residual), residual
    if pending is None:
        return norm(residual), residual
    hidden_states, residual = norm(pending, residual)
    return hidden_states, residual


class SelfAttention(nn.Module):
    """Bidirectional multi-head or grouped-query attention with rotary embedding."""

    def __init__(
        self,
        config: Any,
        rotary: Rotary,
        qkv_bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.head_size = config.hidden_size // config.num_attention_heads
        num_heads = config.num_attention_heads // ranks
        # With more ranks than key heads vLLM's projection gives each rank a copy of one.
        num_kv_heads = max(1, config.num_key_value_heads // ranks)
        self.split_sizes = [
            num_heads * self.head_size,
            num_kv_heads * self.head_size,
            num_kv_heads * self.head_size,
        ]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        accept_fp8_rows(self.qkv_proj)
        self.o_proj = ResidualRowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        accept_fp8_rows(self.o_proj)
        self.rotary = rotary
        self.attn = BidirectionalAttention(
            num_heads, self.head_size, self.head_size**-0.5, num_kv_heads, prefix=f"{prefix}.attn"
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor | QuantizedActivation,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """Attend; returns what is still to be added to the residual sum, as `add_to` does."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.split_sizes, dim=-1)
        query, key = self.rotary(positions, query, key)
        return self.o_proj.add_to(residual, self.attn(query, key, value))


class SwiGLU(nn.Module):
    """The gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = ResidualRowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )
        accept_fp8_rows(self.gate_up_proj)
        accept_fp8_rows(self.down_proj)
        self.act_fn = SiluAndMul()

    def forward(
        self, hidden_states: torch.Tensor | QuantizedActivation, residual: torch.Tensor
    ) -> torch.Tensor | None:
        """Returns what is still to be added to the residual sum, as `add_to` does."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        if takes_fp8_rows(self.down_proj):
            return self.down_proj.add_to(residual, gate_to_fp8(gate_up))
        if gate_up.is_cuda and gate_up.dtype.itemsize == 2:
            return self.down_proj.add_to(residual, silu_and_mul(gate_up))
        return self.down_proj.add_to(residual, self.act_fn(gate_up))


class TransformerBlock(nn.Module):
    """One layer; the residual sum travels beside what a projection has not added to it yet."""

    def __init__(
        self,
        config: Any,
        rotary: Rotary,
        qkv_bias: bool,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(
            config, rotary, qkv_bias, quant_config, prefix=f"{prefix}.self_attn"
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config, quant_config, prefix=f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, pending: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        hidden_states, residual = add_and_norm(
            self.input_layernorm, pending, residual, self.self_attn.qkv_proj
        )
        pending = self.self_attn(positions, hidden_states, residual)
        hidden_states, residual = add_and_norm(
            self.post_attention_layernorm, pending, residual, self.mlp.gate_up_proj
        )
        return self.mlp(hidden_states, residual), residual


class Transformer(nn.Module):
    """Embedding, blocks and the final norm."""

    def __init__(self, vllm_config: VllmConfig, qkv_bias: bool, prefix: str) -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config = model_config.hf_config
        quant_config = vllm_config.quant_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        rotary = Rotary(config, model_config.max_model_len)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config, rotary, qkv_bias, quant_config, prefix=f"{prefix}.layers.{index}"
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Hidden states [tokens, hidden_size] of embeddings `residual`, which are overwritten."""
        pending: torch.Tensor | None = None
        for layer in self.layers:
            pending, residual = layer(positions, pending, residual)
        hidden_states, _ = add_and_norm(self.norm, pending, residual)
        assert isinstance(hidden_states, torch.Tensor)
        return hidden_states


class MaskedDiffusionModel(nn.Module, SupportsQuant):
    """A bidirectional language model that predicts the tokens behind masks.

    Attributes:
        logit_shift: whether row p of the logits predicts position p + 1.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper: ClassVar[WeightsMapper]

    def __init__(self, vllm_config: VllmConfig, qkv_bias: bool, prefix: str) -> None:
        """Build the layers.

        Args:
            vllm_config: of the engine; its model configuration must be supported
                (`checkpoint_config.check_supported`).
            qkv_bias: whether the query, key and value projections have biases.
            prefix: of this module's weights.
        """
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.config = config
        self.logit_shift = MODELS[vllm_config.model_config.architecture].logit_shift
        self._quant_config = vllm_config.quant_config
        # These set parameters themselves.
        self._is_loaded = vllm_config.load_config.load_format in ("dummy", "sharded_state")
        self.model = Transformer(vllm_config, qkv_bias, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [tokens, hidden_size] of token ids [tokens]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the model over packed sequences.

        Args:
            input_ids: integer [tokens].
            positions: int64 [tokens], position of each token in its sequence.
            intermediate_tensors: must be None (no pipeline parallelism).
            inputs_embeds: [tokens, hidden_size] in place of `input_ids`.

        Returns:
            Hidden states [tokens, hidden_size] after the final norm.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(positions, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [rows, vocab_size] of hidden states [rows, hidden_size]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of the parameters that were set.

        Raises:
            ValueError: the first time, when tensors are missing.
        """
        if self._is_loaded:
            # An update of a running engine may be of some tensors.
            loader = AutoWeightsLoader(self)
            return loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
        loaded = load_complete(
            self, weights, self.hf_to_vllm_mapper, self.checkpoint_name, self._quant_config
        )
        self._is_loaded = True
        return loaded

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The checkpoint's name of what is `name` here; the same unless a model says otherwise."""
        return name
