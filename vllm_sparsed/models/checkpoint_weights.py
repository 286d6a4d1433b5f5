"""Loads a checkpoint's tensors and refuses weight files that lack some.

vLLM's own check compares parameters, of which several tensors fill one (query, key and value; gate
and up; all experts), and is off for quantized weights: what is missing would be left as it was
allocated, and the answers would be garbage.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

_OPTIONAL: Final = ("input_scale_ub", "weight_shape", "g_idx_sort_indices")
"""Made from the quantization's settings or from the others, or only a note on them."""

_NAMED: Final = 8
"""Missing tensors that the message names; more are counted."""

# A tensor: the parameter's name and which part of it, None for all of it.
_Part = tuple[str, str | int | None]


def load_complete(
    model: nn.Module,
    weights: Iterable[tuple[str, torch.Tensor]],
    mapper: WeightsMapper,
    checkpoint_name: Callable[[str], str],
    quant_config: Any,
) -> set[str]:
    """Load a whole checkpoint through vLLM's loader.

    Args:
        model: with vLLM's layers, nothing loaded.
        weights: names and tensors of the checkpoint.
        mapper: from the checkpoint's names to the model's.
        checkpoint_name: the other way, for the message.
        quant_config: vLLM's; None: the weights are not quantized.

    Returns:
        Names of the parameters that were set.

    Raises:
        ValueError: tensors are missing; names them.
    """
    expected = dict(_expected(model, quant_config))
    seen: set[_Part] = set()

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in mapper.apply(weights):
            seen.add((name, getattr(tensor, "shard_id", None)))
            yield name, tensor

    loaded: set[str] = AutoWeightsLoader(model).load_weights(noted())
    missing = sorted(
        checkpoint_name(name)
        for part, name in expected.items()
        # A checkpoint may hold all parts in one tensor.
        if part not in seen and (part[0], None) not in seen and not _fused(part[0], seen)
    )
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ValueError(
            f"The weight files lack {len(missing)} tensors that config.json asks for: "
            f"{', '.join(missing[:_NAMED])}{more}."
        )
    return loaded


def _expected(model: nn.Module, quant_config: Any) -> Iterator[tuple[_Part, str]]:
    """What must come, and its name in words of the checkpoint's projections."""
    # Without an order of activations the index of groups says nothing new.
    no_order = quant_config is not None and not getattr(quant_config, "desc_act", True)
    optional = (*_OPTIONAL, "g_idx") if no_order else _OPTIONAL
    known: set[int] = set()
    for prefix, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            # Tied parameters count once; empty ones hold nothing.
            if id(parameter) in known or kind.endswith(optional) or not parameter.numel():
                continue
            known.add(id(parameter))
            if isinstance(module, RoutedExperts):
                yield from _expert_tensors(prefix, module, kind)
                continue
            for part, projection in _parts(module):
                name = f"{prefix}.{kind}"
                spoken = f"{prefix.rpartition('.')[0]}.{projection}.{kind}" if projection else name
                yield (name, part), spoken


def _parts(module: nn.Module) -> tuple[tuple[str | int | None, str], ...]:
    if isinstance(module, QKVParallelLinear):
        return (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"))
    if isinstance(module, MergedColumnParallelLinear):
        return ((0, "gate_proj"), (1, "up_proj"))
    return ((None, ""),)


def _expert_tensors(prefix: str, module: RoutedExperts, kind: str) -> Iterator[tuple[_Part, str]]:
    """One tensor of each projection for each expert of this rank."""
    # vLLM keeps them one level deeper than the checkpoint.
    prefix = prefix.removesuffix(".routed_experts")
    group, _, suffix = kind.partition("_")
    projections = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}[group]
    for expert in module.expert_map_manager.get_local_expert_ids():
        for projection in projections:
            name = f"{prefix}.{expert}.{projection}.{suffix}"
            yield (name, None), name


def _fused(name: str, seen: set[_Part]) -> bool:
    """Whether one tensor of all experts holds the one of `name`."""
    before, found, after = name.partition(".experts.")
    if not found:
        return False
    _, projection, suffix = after.split(".", 2)
    fused = "gate_up_proj" if projection in ("gate_proj", "up_proj") else projection
    ending = "" if suffix == "weight" else f".{suffix}"
    return any((f"{before}.experts.{fused}{last}", None) in seen for last in (ending, f".{suffix}"))
