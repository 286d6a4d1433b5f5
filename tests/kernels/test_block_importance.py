"""The block importance maps against the full softmax in float64."""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_sparsed.kernels.block_importance import block_importance
from vllm_sparsed.kernels.block_importance.configs import TABLE, TileConfig
from vllm_sparsed.kernels.block_importance.reference import block_importance_reference
from vllm_sparsed.kernels.block_importance.torch_path import block_importance_torch
from vllm_sparsed.kernels.pattern_building import generation_start_block

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32

# length, canvas, block size, query heads, key heads, head_dim, dtype, log-sum-exp given
INTERPRETED = [
    (1, 1, 16, 2, 2, 64, FLOAT32, False),
    (1, 1, 128, 1, 1, 128, FLOAT16, True),
    (63, 1, 16, 7, 1, 16, FLOAT16, False),
    (63, 40, 32, 2, 2, 80, FLOAT32, True),
    (63, 63, 64, 2, 1, 96, FLOAT16, False),
    (128, 1, 64, 2, 2, 32, FLOAT32, False),
    (128, 128, 128, 8, 1, 64, FLOAT16, True),
    (129, 2, 128, 2, 2, 96, FLOAT32, False),
    (129, 129, 16, 8, 1, 80, FLOAT16, False),
    (129, 100, 32, 7, 1, 64, FLOAT32, True),
    (1000, 1, 128, 1, 1, 64, FLOAT32, True),
    (1000, 300, 64, 2, 1, 128, FLOAT16, False),
    (1000, 900, 32, 1, 1, 32, FLOAT32, False),
    (1000, 1000, 16, 1, 1, 16, FLOAT16, True),
    (1000, 129, 16, 1, 1, 256, FLOAT16, True),
    (4097, 1111, 128, 1, 1, 64, FLOAT16, True),
]
ON_GPU = [
    (length, max(1, round(length * share)), block_size, heads, kv_heads, 128, dtype, given)
    for index, (length, block_size, (heads, kv_heads), dtype) in enumerate(
        itertools.product(
            (1, 63, 128, 129, 1000, 4097),
            (16, 32, 64, 128),
            ((2, 2), (7, 1), (8, 1)),
            (BFLOAT16, FLOAT16, FLOAT32),
        )
    )
    for share, given in [((0.0, 0.1, 0.5, 1.0)[index % 4], index % 3 > 0)]
] + [
    (1000, 300, block_size, 4, 2, head_dim, dtype, given)
    for head_dim, block_size, dtype, given in itertools.product(
        (16, 32, 64, 80, 96, 256), (32, 128), (BFLOAT16, FLOAT32), (True, False)
    )
]


def name(case: tuple) -> str:
    length, canvas, block_size, heads, kv_heads, head_dim, dtype, given = case
    return (
        f"L{length}-G{canvas}-b{block_size}-h{heads}on{kv_heads}-d{head_dim}-"
        f"{str(dtype).removeprefix('torch.')}-{'lse' if given else 'nolse'}"
    )


def inputs(case: tuple, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """q and k as views of one fused projection, and the log-sum-exp where it is given."""
    length, _, _, heads, kv_heads, head_dim, dtype, given = case
    generator = torch.Generator().manual_seed(length + head_dim)
    qkv = torch.randn((length, (heads + 2 * kv_heads) * head_dim), generator=generator)
    qkv[:, : heads * head_dim] *= 2  # far from uniform attention
    q, k, _ = (
        qkv.to(device, dtype)
        .split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    )  # fmt: skip
    q, k = q.view(length, heads, head_dim), k.view(length, kv_heads, head_dim)
    lse = None
    if given:
        keys = k.double().repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * head_dim**-0.5
        lse = scores.logsumexp(dim=-1).float()
    return q, k, lse


def pytorch_maps(
    q: Tensor, k: Tensor, lse: Tensor | None, first_generation_block: int, **arguments
) -> tuple[Tensor, Tensor]:
    """PyTorch's maps; a given log-sum-exp takes the place of the sum in its softmax."""
    full, generation = block_importance_reference(
        q, k, first_generation_block=first_generation_block, **arguments
    )
    if lse is not None:
        full = full.float()
        block_size = arguments["block_size"]
        missing = -len(q) % block_size
        for head in range(q.shape[1]):
            keys = k[:, head * k.shape[1] // q.shape[1]]
            scores = (q[:, head] @ keys.T).float() * arguments["scale"]
            weights = F.pad((scores - lse[head, :, None]).exp(), (0, missing, 0, missing))
            blocks = weights.unflatten(1, (-1, block_size)).unflatten(0, (-1, block_size))
            full[head] = blocks.sum(dim=(1, 3)) / block_size**2
        if first_generation_block == 0:
            generation = full
    return full, generation


def assert_accurate(
    results: tuple[Tensor, Tensor], q: Tensor, k: Tensor, lse: Tensor | None = None, **arguments
) -> None:
    """Error at most twice PyTorch's in the same dtype, or some roundings of the largest value.

    A log-sum-exp that is given brings its own rounding to float32, half a unit in the last place,
    which scales its whole row, to PyTorch as well. Nor does the rounding of the row's scores cancel
    as in a softmax of one's own: one more rounding of the products' sum without signs.
    """
    roundings = 2.0
    if lse is not None:
        keys = k.float().abs().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        products = torch.einsum("qhd,khd->hqk", q.float().abs(), keys) * arguments["scale"]
        roundings += lse.abs().max().item() / 2 + products.mean().item()
    expected = block_importance_reference(q.double(), k.double(), **arguments)
    pytorch = pytorch_maps(q, k, lse, **arguments)
    for result, exact, peer in zip(results, expected, pytorch, strict=True):
        assert result.dtype == torch.float32
        assert result.shape == exact.shape
        assert result.isfinite().all()
        allowed = 2 * (peer.double() - exact).abs().max().item()
        rounding = roundings * torch.finfo(torch.float32).eps * exact.max().item()
        error = (result.double() - exact).abs().max().item()
        assert error <= max(allowed, rounding), f"{allowed:.3g} by PyTorch, {rounding:.3g} rounding"


def check_kernel(case: tuple, device: str, config: TileConfig | None = None) -> None:
    length, canvas, block_size, _, _, head_dim, _, _ = case
    q, k, lse = inputs(case, device)
    arguments = {
        "first_generation_block": generation_start_block(length, canvas, block_size),
        "block_size": block_size,
        "scale": head_dim**-0.5,
    }
    results = block_importance(q, k, lse=lse, config=config, **arguments)
    assert_accurate(results, q, k, lse, **arguments)


@pytest.fixture
def interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("these tests run the Triton kernels on a CPU: set TRITON_INTERPRET=1")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("case", INTERPRETED, ids=name)
def test_kernel_in_interpreter(case: tuple) -> None:
    check_kernel(case, "cpu")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(TileConfig(128, 128, 4, 2, tma=True), id="descriptors"),
        pytest.param(TileConfig(128, 64, 8, 2, tma=True), id="two_tiles_to_a_block"),
        pytest.param(TileConfig(256, 128, 8, 2), id="two_blocks_to_a_tile"),
        pytest.param(TileConfig(128, 64, 8, 1, chunk=64), id="slices"),
    ],
)
@pytest.mark.parametrize(
    "case",
    [(300, 50, 128, 2, 1, 64, FLOAT16, False), (300, 120, 32, 2, 1, 128, FLOAT16, True)],
    ids=name,
)
def test_other_tiles_in_interpreter(case: tuple, config: TileConfig) -> None:
    check_kernel(case, "cpu", config)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU, ids=name)
def test_kernel_on_gpu(case: tuple) -> None:
    check_kernel(case, "cuda")


@pytest.mark.parametrize("case", [c for c in INTERPRETED if c[0] < 4000], ids=name)
def test_torch_path(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    length, canvas, block_size, _, _, head_dim, _, _ = case
    # A few hundred rows of scores at a time, so that chunks end inside the sequence.
    monkeypatch.setattr(
        "vllm_sparsed.kernels.block_importance.torch_path.SCORE_BYTES", 4 * 300 * length
    )
    q, k, _ = inputs(case, "cpu")
    arguments = {
        "first_generation_block": generation_start_block(length, canvas, block_size),
        "block_size": block_size,
        "scale": head_dim**-0.5,
    }
    assert_accurate(block_importance_torch(q, k, **arguments), q, k, **arguments)


def test_reference_by_hand() -> None:
    """Equal scores: every probability is 1 / keys, and the ragged block is part zeros."""
    q = torch.ones((3, 1, 16))
    full, generation = block_importance_reference(
        q, q, first_generation_block=1, block_size=2, scale=0.25
    )
    assert torch.allclose(full, torch.tensor([[[4 / 12, 2 / 12], [2 / 12, 1 / 12]]]))
    assert torch.allclose(generation, torch.tensor([[[0.5], [0.25]]]))


@pytest.mark.usefixtures("interpreter")
def test_extreme_scores_stay_finite() -> None:
    """Scores in the thousands; generation keys that get nothing of the full softmax."""
    q = torch.full((200, 1, 16), 30.0)
    k = torch.full((200, 1, 16), 30.0)
    k[150:] = -30.0
    full, generation = block_importance(q, k, first_generation_block=5, block_size=32, scale=1.0)
    assert full.isfinite().all()
    assert generation.isfinite().all()
    assert full[0, :, 5:].max() == 0
    # A float32 log-sum-exp of 14400 resolves 1e-3.
    assert torch.allclose(generation[0, 0].sum(), torch.tensor(1 / 32), rtol=2e-3)


def test_table_is_complete() -> None:
    for (head_dim, _, block_size, _), config in TABLE.items():
        assert config.block_m % block_size == 0
        assert config.block_n % block_size == 0 or block_size % config.block_n == 0
        assert config.chunk == 0 or head_dim % config.chunk == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"k": torch.zeros((9, 2, 16))}, "q and k must be", id="lengths"),
        pytest.param({"k": torch.zeros((8, 2, 16)).half()}, "dtype", id="dtypes"),
        pytest.param({"k": torch.zeros((8, 3, 16))}, "num_kv_heads", id="heads"),
        pytest.param({"k": torch.zeros((8, 16, 2)).mT}, "contiguous", id="strides"),
        pytest.param({"block_size": 48}, "block_size", id="block_size"),
        pytest.param({"first_generation_block": 1}, "first_generation_block", id="boundary"),
        pytest.param({"lse": torch.zeros((4, 9))}, "lse", id="lse"),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros((8, 4, 16)),
        "k": torch.zeros((8, 2, 16)),
        "first_generation_block": 0,
        "block_size": 16,
        "scale": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        block_importance(**(arguments | change))
