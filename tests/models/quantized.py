"""Quantizes a checkpoint as the formats of GPTQ, AWQ and compressed-tensors have it, to nearest.

The tests compare with plain PyTorch on the weights that the quantized ones stand for.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 128
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Quantized:
    """One projection: its tensors by suffix, and the weight [out, in] that they stand for."""

    tensors: Mapping[str, Tensor]
    stands_for: Tensor


def _by_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit values [out, in] around 8 and their scales [out, groups] in float16."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(dim=-1) / 7).half()
    values = (groups / scales[..., None].float()).round().clamp(-8, 7) + 8
    return values.flatten(-2).int(), scales


def _stands_for(values: Tensor, scales: Tensor) -> Tensor:
    return (values - 8).float() * scales.float().repeat_interleave(GROUP, dim=-1)


def _pack(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight 4-bit values of the last dimension in an int32."""
    groups = values.unflatten(-1, (-1, 8))[..., list(order)].to(torch.int64)
    packed = (groups << torch.arange(0, 32, 4)).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(weight: Tensor) -> Quantized:
    values, scales = _by_groups(weight)
    zeros = torch.full(scales.T.shape, 7)
    tensors = {
        "qweight": _pack(values).T.contiguous(),
        "qzeros": _pack(zeros),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }
    return Quantized(tensors, _stands_for(values, scales))


def awq(weight: Tensor) -> Quantized:
    values, scales = _by_groups(weight)
    zeros = torch.full(scales.T.shape, 8)
    tensors = {
        "qweight": _pack(values.T.contiguous(), _AWQ_ORDER),
        "qzeros": _pack(zeros, _AWQ_ORDER),
        "scales": scales.T.contiguous(),
    }
    return Quantized(tensors, _stands_for(values, scales))


def int8(weight: Tensor) -> Quantized:
    scales = weight.float().abs().amax(dim=-1, keepdim=True) / 127
    values = (weight.float() / scales).round().clamp(-127, 127).to(torch.int8)
    return Quantized({"weight": values, "weight_scale": scales}, values.float() * scales)


def float8(weight: Tensor) -> Quantized:
    scales = weight.float().abs().amax(dim=-1, keepdim=True) / 448
    values = (weight.float() / scales).to(torch.float8_e4m3fn)
    return Quantized({"weight": values, "weight_scale": scales}, values.float() * scales)


def int4_packed(weight: Tensor) -> Quantized:
    """compressed-tensors' pack-quantized."""
    values, scales = _by_groups(weight)
    tensors = {
        "weight_packed": _pack(values),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return Quantized(tensors, _stands_for(values, scales))


def compressed_tensors(kind: str, ignore: list[str]) -> dict[str, Any]:
    """quantization_config of `int8`, `float8` or `int4_packed`."""
    number = {"type": "float" if kind == "float8" else "int", "symmetric": True, "num_bits": 8}
    weights = {**number, "strategy": "channel", "dynamic": False}
    activations: dict[str, Any] | None = {**number, "strategy": "token", "dynamic": True}
    if kind == "int4_packed":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": GROUP}
        activations = None
    formats = {"int8": "int-quantized", "float8": "float-quantized"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.get(kind, "pack-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def quantize_checkpoint(
    source: Path,
    folder: Path,
    quantize: Callable[[Tensor], Quantized],
    quantization_config: dict[str, Any],
    skip: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """The quantized checkpoint, and an ordinary one with the weights that it stands for."""
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        kept = suffix != "weight" or tensor.ndim != 2 or any(part in module for part in skip)
        if kept:
            tensors[name] = plain[name] = tensor
            continue
        quantized = quantize(tensor)
        plain[name] = quantized.stands_for
        tensors |= {f"{module}.{key}": value for key, value in quantized.tensors.items()}
    for target, weights, extra in (
        (folder / "quantized", tensors, {"quantization_config": quantization_config}),
        (folder / "plain", plain, {}),
    ):
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps({**config, **extra}))
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return folder / "quantized", folder / "plain"
