"""Rotary scalings reach the table of angles, which stays in float32."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_sparsed.models.checkpoint_config import LLaDAConfig
from vllm_sparsed.models.rotary import Rotary

HEAD_SIZE = 16
TRAINED = 128


@pytest.fixture(autouse=True)
def _current_config() -> Any:
    with set_current_vllm_config(VllmConfig()):
        yield


def make_config(**changes: Any) -> LLaDAConfig:
    config = LLaDAConfig(d_model=32, n_heads=2, max_sequence_length=TRAINED, rope_theta=1e4)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def angles_of(config: LLaDAConfig, length: int) -> tuple[Tensor, float]:
    """Angles [length, HEAD_SIZE / 2] and the factor on cos and sin, as transformers has them."""
    parameters: Any = config.rope_parameters
    if parameters["rope_type"] == "default":
        exponents = torch.arange(0, HEAD_SIZE, 2, dtype=torch.float64) / HEAD_SIZE
        frequencies, factor = parameters["rope_theta"] ** -exponents, 1.0
    else:
        initialise = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, factor = initialise(config, "cpu", seq_len=length)
    return torch.outer(torch.arange(length, dtype=torch.float64), frequencies.double()), factor


@pytest.mark.parametrize(
    ("scaling", "served"),
    [
        ({}, TRAINED),
        ({"rope_theta": 3e6}, TRAINED),
        ({}, 3 * TRAINED),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 4 * TRAINED),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 2 * TRAINED),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, TRAINED),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": TRAINED,
                }
            },
            4 * TRAINED,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": TRAINED,
                }
            },
            4 * TRAINED,
        ),
    ],
    ids=[
        "none",
        "theta",
        "longer-than-trained",
        "linear",
        "dynamic",
        "dynamic-short",
        "yarn",
        "llama3",
    ],
)
def test_table(scaling: dict[str, Any], served: int) -> None:
    config = make_config(**scaling)
    angles, factor = angles_of(config, served)
    table = Rotary(config, served).rope.cos_sin_cache[:served].double()
    assert table.shape == (served, HEAD_SIZE)
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
    # float32 frequencies times positions up to 512.
    assert (table - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED},
    ],
    ids=["linear", "yarn"],
)
def test_scaling_too_short_for_the_served_length(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"covers {2 * TRAINED} positions.*--max-model-len"):
        Rotary(make_config(rope_scaling=scaling), 2 * TRAINED + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotation(dtype: torch.dtype) -> None:
    config = make_config()
    generator = torch.Generator().manual_seed(0)
    # Views of one projection, as in the model.
    projected = torch.randn(TRAINED, 3 * HEAD_SIZE, generator=generator).to(dtype)
    query, key = projected.split([2 * HEAD_SIZE, HEAD_SIZE], dim=-1)
    angles, _ = angles_of(config, TRAINED)
    expected = [rotate(x.double(), angles) for x in (query, key)]
    positions = torch.arange(TRAINED)
    results = Rotary(config, TRAINED)(positions, query, key)
    epsilon = torch.finfo(dtype).eps
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == dtype
        # One rounding of the result (half an epsilon), and the angles' own error in float32.
        assert ((result.double() - exact).abs() <= 0.5 * epsilon * exact.abs() + 1e-4).all()


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Element d of a head pairs with d + HEAD_SIZE / 2."""
    heads = x.unflatten(-1, (-1, HEAD_SIZE))
    first, second = heads.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(1)
