"""LLaDA, iLLaDA, LLaDA-MoE and Dream in plain PyTorch, from the checkpoint's own tensors."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, linear, silu

# LLaDA's names of a layer's tensors, by Dream's.
_LLADA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What config.json says, under one set of names.

    Attributes:
        logit_shift: whether row p of the logits predicts position p + 1 (Dream).
        experts_per_token: of LLaDA-MoE; 0: there are no experts.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    rms_norm_eps: float
    mask_token_id: int
    eos_token_id: int
    logit_shift: bool
    experts_per_token: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Dimensions":
        """Raises ValueError where the model is none of these, or scales its rotation."""
        if config.get("rope_scaling") or config.get("rope_parameters"):
            raise ValueError("rotary scaling is not part of the plain reference")
        if config["architectures"] == ["LLaDAModelLM"]:
            return cls(
                hidden_size=config["d_model"],
                num_layers=config["n_layers"],
                num_heads=config["n_heads"],
                num_kv_heads=config.get("n_kv_heads") or config["n_heads"],
                rope_theta=config["rope_theta"],
                rms_norm_eps=config["rms_norm_eps"],
                mask_token_id=config.get("mask_token_id", 126336),
                eos_token_id=config.get("eos_token_id", 126081),
                logit_shift=False,
            )
        shape = _HUGGING_FACE.get(config["architectures"][0])
        if shape is not None:
            return cls(
                hidden_size=config["hidden_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config["num_key_value_heads"],
                rope_theta=config["rope_theta"],
                rms_norm_eps=config.get("rms_norm_eps") or config["layer_norm_eps"],
                mask_token_id=config.get("mask_token_id", shape.mask_token_id),
                eos_token_id=config.get("eos_token_id", shape.eos_token_id),
                logit_shift=shape.logit_shift,
                experts_per_token=config.get("num_experts_per_tok", 0),
            )
        raise ValueError(f"no reference for {config['architectures']}")


@dataclass(frozen=True, slots=True)
class _Family:
    """What config.json may leave out, of models with Hugging Face's names."""

    mask_token_id: int
    eos_token_id: int
    logit_shift: bool


_HUGGING_FACE = {
    "DreamModel": _Family(151666, 151643, logit_shift=True),
    "ILLaDAForCausalLM": _Family(5, 2, logit_shift=False),
    "LLaDAMoEModelLM": _Family(156895, 156892, logit_shift=False),
}


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer attends with: q [heads, L, D] and k [kv heads, L, D], after rotation."""

    query: Tensor
    key: Tensor


@dataclass(slots=True)
class StoredLayer:
    """One layer's keys and values [kv heads, L, D] of a sequence, kept between passes."""

    key: Tensor
    value: Tensor

    def replace(self, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Write rows [kv heads, rows, D] from position `start` on; returns all that is stored."""
        rows = slice(start, start + key.shape[1])
        self.key[:, rows], self.value[:, rows] = key, value
        return self.key, self.value


class ReferenceModel:
    """A checkpoint and its forward pass over one sequence."""

    def __init__(self, dimensions: Dimensions, weights: dict[str, Tensor]) -> None:
        """Take tensors under Dream's (Qwen2's) names, of one dtype and device."""
        self.dimensions = dimensions
        self.weights = weights

    @classmethod
    def load(
        cls, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "ReferenceModel":
        """Read config.json and *.safetensors of a folder."""
        config = json.loads((folder / "config.json").read_text())
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(load_file(file))
        if config["architectures"] == ["LLaDAModelLM"]:
            weights = _with_dream_names(weights, config["n_layers"])
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        moved = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
        return cls(Dimensions.from_config(config), moved)

    def logits(
        self,
        tokens: Tensor,
        masks: list[Tensor] | None = None,
        stored: list[StoredLayer] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, list[LayerAttention]]:
        """Run the model over all rows of a sequence or over some that follow each other.

        Args:
            tokens: int64 [rows].
            masks: per layer bool [heads, rows, L], which keys each query attends to; None: all.
            stored: per layer the keys and values of the whole sequence; those of the rows are
                replaced, then the rows attend to all. None: the rows are the whole sequence.
            start: position of the first row.

        Returns:
            Logits [rows, vocabulary], and each layer's queries and keys.
        """
        dims = self.dimensions
        hidden = embedding(tokens, self.weights["model.embed_tokens.weight"])
        attended = []
        for layer in range(dims.num_layers):
            name = f"model.layers.{layer}."
            normed = self._norm(hidden, f"{name}input_layernorm")
            query = self._rotate(self._normed_heads(normed, f"{name}self_attn.q_"), start)
            key = self._rotate(self._normed_heads(normed, f"{name}self_attn.k_"), start)
            value = self._heads(normed, f"{name}self_attn.v_proj")
            if stored is not None:
                key, value = stored[layer].replace(key, value, start)
            mixed = attention(query, key, value, None if masks is None else masks[layer])
            attended.append(LayerAttention(query, key))
            hidden = hidden + self._linear(mixed, f"{name}self_attn.o_proj")
            normed = self._norm(hidden, f"{name}post_attention_layernorm")
            hidden = hidden + self._feed_forward(normed, f"{name}mlp.")
        return self._linear(self._norm(hidden, "model.norm"), "lm_head"), attended

    def _feed_forward(self, x: Tensor, name: str) -> Tensor:
        if self.dimensions.experts_per_token:
            return self._experts(x, name)
        gate = silu(self._linear(x, f"{name}gate_proj"))
        return self._linear(gate * self._linear(x, f"{name}up_proj"), f"{name}down_proj")

    def _experts(self, x: Tensor, name: str) -> Tensor:
        """The best experts of each row of x [L, hidden_size], weighted by the router's softmax over
        all of them, in float32 at least, which is not renormalised."""
        router = self._linear(x, f"{name}gate")
        shares = router.to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1)
        chosen = shares.topk(self.dimensions.experts_per_token, dim=-1)
        mixed = torch.zeros_like(x)
        for expert in range(router.shape[-1]):
            prefix = f"{name}experts.{expert}."
            rows, places = (chosen.indices == expert).nonzero(as_tuple=True)
            gate = silu(self._linear(x[rows], f"{prefix}gate_proj"))
            up = self._linear(x[rows], f"{prefix}up_proj")
            output = self._linear(gate * up, f"{prefix}down_proj")
            share = chosen.values[rows, places, None].to(x.dtype)
            mixed.index_add_(0, rows, output * share)
        return mixed

    def _normed_heads(self, x: Tensor, name: str) -> Tensor:
        """[L, heads * D] -> [heads, L, D], each head normalised where the model has such norms."""
        heads = self._heads(x, f"{name}proj")
        if f"{name}norm.weight" in self.weights:
            return self._norm(heads, f"{name}norm")
        return heads

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        # In float32 at least, whatever the weights are in.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(dim=-1, keepdim=True)
        normed = wide * torch.rsqrt(mean_square + self.dimensions.rms_norm_eps)
        return self.weights[f"{name}.weight"] * normed.to(x.dtype)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """[L, heads * D] -> [heads, L, D]."""
        return self._linear(x, name).unflatten(-1, (-1, self.dimensions.head_dim)).transpose(0, 1)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary embedding of [heads, L, D]: element d pairs with d + D / 2; float32 at least."""
        half = self.dimensions.head_dim // 2
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        exponents = torch.arange(0, half, dtype=wide.dtype, device=x.device) / half
        frequencies = 1.0 / self.dimensions.rope_theta**exponents
        positions = start + torch.arange(x.shape[1], dtype=wide.dtype, device=x.device)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        first, second = wide[..., :half], wide[..., half:]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Full or masked attention with the whole L x L matrix.

    Args:
        query: [heads, rows, D].
        key: [kv heads, L, D].
        value: [kv heads, L, D].
        mask: bool [heads, rows, L], True where a query attends to a key; None: everywhere.

    Returns:
        [rows, heads * D].
    """
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    scores = query @ key.transpose(1, 2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)


def llada_name(name: str) -> str:
    """The name that a tensor has in LLaDA's checkpoints, from its name in Dream's."""
    top = {"model.embed_tokens": "wte", "model.norm": "ln_f", "lm_head": "ff_out"}
    module, kind = name.rsplit(".", 1)
    if module in top:
        return f"model.transformer.{top[module]}.{kind}"
    layer, part = module.removeprefix("model.layers.").split(".", 1)
    return f"model.transformer.blocks.{layer}.{_LLADA_LAYER[part]}.{kind}"


def _with_dream_names(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    renamed = {
        "model.embed_tokens.weight": weights["model.transformer.wte.weight"],
        "model.norm.weight": weights["model.transformer.ln_f.weight"],
    }
    if "model.transformer.ff_out.weight" in weights:
        renamed["lm_head.weight"] = weights["model.transformer.ff_out.weight"]
    for layer in range(num_layers):
        for name, llada_name in _LLADA_LAYER.items():
            for kind in ("weight", "bias"):
                tensor = weights.get(f"model.transformer.blocks.{layer}.{llada_name}.{kind}")
                if tensor is not None:
                    renamed[f"model.layers.{layer}.{name}.{kind}"] = tensor
    unused = [name for name in weights if not re.search(_EXPECTED_LLADA, name)]
    if unused:
        raise ValueError(f"unexpected tensors: {unused}")
    return renamed


_EXPECTED_LLADA = r"^model\.transformer\.(wte|ln_f|ff_out|blocks\.\d+\.\w+)\.(weight|bias)$"
