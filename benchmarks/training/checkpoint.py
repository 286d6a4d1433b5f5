"""The state of a training, in parts that are small enough for a repository."""

import json
import shutil
from collections.abc import Mapping
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


def training_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's moments by parameter name, and PyTorch's random state."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"weight/{name}": tensor for tensor, name in names.items()}
    for parameter, moments in optimizer.state.items():
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"{kind}/{names[parameter]}"] = moments[kind]
    tensors["random_state"] = torch.get_rng_state()
    return tensors


def restore(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `training_tensors` took; raises KeyError where a tensor is missing."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:
            optimizer.state[parameter] = {
                kind: tensors[f"{kind}/{name}"].to(
                    "cpu"
                    if kind == "step" and not optimizer.defaults["fused"]
                    else parameter.device
                )
                for kind in ("exp_avg", "exp_avg_sq", "step")
            }
    torch.set_rng_state(tensors["random_state"])
