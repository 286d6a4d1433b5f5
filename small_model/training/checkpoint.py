"""The state of a training, in parts that are small enough for a repository."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PART_BYTES: Final = 14_000_000
_STATE: Final = "state.json"


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Replace the checkpoint in a folder; a crash leaves the old one or the new one.

    Args:
        folder: made where it is missing.
        tensors: weights, optimizer and random state; moved to the CPU here.
        state: what JSON holds exactly.

    Raises:
        ValueError: one tensor alone is larger than a part.
    """
    fresh, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    part: dict[str, Tensor] = {}
    size, number = 0, 0
    for name, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        if held.nbytes > PART_BYTES:
            raise ValueError(f"{name} has {held.nbytes} bytes, a part {PART_BYTES}")
        if size + held.nbytes > PART_BYTES:
            save_file(part, fresh / f"part-{number:02d}.safetensors")
            part, size, number = {}, 0, number + 1
        part[name] = held
        size += held.nbytes
    save_file(part, fresh / f"part-{number:02d}.safetensors")
    (fresh / _STATE).write_text(json.dumps(state, indent=1) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of a folder, or of the one that a crash left; None if there is none."""
    for place in (folder, folder.with_name(f"{folder.name}.old")):
        if (place / _STATE).exists():
            tensors: dict[str, Tensor] = {}
            for part in sorted(place.glob("part-*.safetensors")):
                tensors.update(load_file(part))
            state: dict[str, Any] = json.loads((place / _STATE).read_text())
            return tensors, state
    return None


def training_tensors(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Weights and optimizer moments by parameter name, and PyTorch's random state."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"weight/{name}": tensor for tensor, name in names.items()}
    for optimizer in optimizers:
        for parameter, moments in optimizer.state.items():
            for kind, moment in moments.items():
                tensors[f"moment/{kind}/{names[parameter]}"] = moment
    tensors["random_state"] = torch.get_rng_state()
    return tensors


def restore(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `training_tensors` took; raises KeyError where a weight is missing."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("moment/"):
            _, kind, name = key.split("/", 2)
            moments.setdefault(name, {})[kind] = tensor
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found = moments.get(names[parameter], {})
                for kind, tensor in found.items():
                    # AdamW counts its steps on the device only where it is fused.
                    on_cpu = kind == "step" and not group.get("fused")
                    device = "cpu" if on_cpu else parameter.device
                    optimizer.state[parameter][kind] = tensor.to(device)
    torch.set_rng_state(tensors["random_state"])
