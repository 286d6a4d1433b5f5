"""Kernels of a step, sorted into parts."""

import pytest
import torch

from benchmarks.engine.breakdown import PARTS, Kernel, StepProfiler, breakdown, part_of

NAMES = {
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>": (
        "attention"
    ),
    "block_sparse_forward_sm90": "attention",
    "block_importance_kernel": "pattern",
    "row_statistics_kernel": "pattern",
    "select_blocks_kernel": "pattern",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "linear",
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>": "linear",
    "void vllm::act_and_mul_kernel<c10::BFloat16, ...silu_kernel...>": "activation",
    "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>": "rest",
    "void vllm::rotary_embedding_kernel<c10::BFloat16, true>": "rest",
    "void at::native::reduce_kernel<512, 1, ...>": None,
}


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_kernels_name_tells_its_part(name: str) -> None:
    assert part_of(name) == NAMES[name]


def test_what_follows_the_last_layer_is_the_sampler() -> None:
    order = [
        ("gather", 10.0),
        ("fused_add_rms_norm", 20.0),
        ("nvjet_qkv", 100.0),
        ("rotary_embedding", 30.0),
        ("flash_fwd", 400.0),
        ("act_and_mul_silu", 50.0),
        ("nvjet_down", 200.0),
        ("fused_add_rms_norm", 20.0),
        ("gather", 5.0),
        ("nvjet_logits", 300.0),
        ("reduce_kernel", 40.0),
        ("reduce_kernel", 60.0),
    ]
    kernels = [Kernel(name, float(i), micros) for i, (name, micros) in enumerate(order)]
    profile = breakdown(kernels[::-1], wall_ms=2.0)
    assert profile.milliseconds == pytest.approx(
        {
            "attention": 0.4,
            "pattern": 0.0,
            "linear": 0.6,
            "activation": 0.05,
            "rest": 0.08,
            "sampler": 0.105,
            "overhead": 2.0 - 1.235,
        }
    )
    assert tuple(profile.milliseconds) == PARTS
    assert profile.longest[0] == (pytest.approx(0.4), 1, "flash_fwd")
    assert (pytest.approx(0.1), 2, "reduce_kernel") in profile.longest


def test_overhead_is_never_negative() -> None:
    profile = breakdown([Kernel("nvjet", 0.0, 5000.0)], wall_ms=1.0)
    assert profile.milliseconds["overhead"] == 0.0
    assert profile.milliseconds["linear"] == 5.0


def test_the_profiler_keeps_the_chosen_steps_apart() -> None:
    """The step before a chosen one warms the profiler up, unless it is chosen itself."""
    profiler = StepProfiler([2, 3, 6])
    rows = torch.arange(6.0).reshape(2, 3)
    work = [rows.exp, rows.sin, rows.sum, rows.log1p, rows.abs, rows.cos, rows.sqrt, rows.tanh]
    for step, run in enumerate(work):
        with profiler.on_step(step):
            run()
    names = {step: {kernel.name for kernel in profiler.kernels(step)} for step in range(len(work))}
    assert {"aten::sum"} <= names[2]
    assert names[3] == {"aten::log1p"}
    assert names[6] == {"aten::sqrt"}
    assert not any(names[step] for step in (0, 1, 4, 5, 7))


def test_a_failed_step_ends_its_profile() -> None:
    profiler = StepProfiler([1])
    for step in (0, 1):
        with pytest.raises(ZeroDivisionError), profiler.on_step(step):
            raise ZeroDivisionError
    profiler = StepProfiler([0])
    with profiler.on_step(0):
        torch.ones(2).exp()
    assert any(kernel.name == "aten::exp" for kernel in profiler.kernels(0))
