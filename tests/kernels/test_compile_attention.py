"""Ahead-of-time compilation of the attention kernels for every supported chip; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4
from vllm_sparsed.kernels.block_sparse_attention.configs import hopper_config, tile_config
from vllm_sparsed.kernels.devices import FLOATS
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES, CAPABILITIES, HEAD_DIMS

# Shared memory that one program can have, in KiB.
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NO_SPILLS = {
    (head_dim, torch.bfloat16, block_size, capability)
    for head_dim, block_size, capability in product((64, 128), BLOCK_SIZES, CAPABILITIES)
}
# Chips without wgmma keep fp8 keys in registers while they widen them.
MAY_SPILL = {("window, fp8 pages", capability) for capability in CAPABILITIES if capability[0] == 8}
# head_dim, dtype, block size, compute capability: the usual shapes and the largest tiles.
REPRESENTATIVE = [
    *((128, torch.bfloat16, block_size, (9, 0)) for block_size in BLOCK_SIZES),
    (128, torch.bfloat16, 128, (8, 0)),
    (128, torch.bfloat16, 32, (8, 0)),
    (256, torch.bfloat16, 128, (8, 6)),
    (64, torch.float16, 128, (8, 6)),
    (128, torch.bfloat16, 128, (8, 9)),
    (128, torch.bfloat16, 32, (8, 9)),
    (256, torch.float32, 64, (8, 9)),
]
REPRESENTATIVE_WINDOWS = [
    (128, torch.bfloat16, 128, (9, 0)),
    (128, torch.bfloat16, 32, (8, 0)),
    (256, torch.bfloat16, 128, (8, 6)),
    (64, torch.bfloat16, 64, (8, 9)),
]


def describe(
    kernel: Any, dtype: str, constants: dict[str, Any], keys: str = ""
) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Argument types by name, and the divisibility that launches on fused tensors have."""
    types: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, name in enumerate(kernel.arg_names):
        aligned = False
        if name in constants:
            types[name] = "constexpr"
        elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
            types[name] = f"*{keys if keys and name in ('k_ptr', 'v_ptr') else dtype}"
            aligned = True
        elif name in ("partial_ptr", "statistics_ptr"):
            types[name] = "*fp32"
            aligned = True
        elif name in ("k_scale_ptr", "v_scale_ptr"):
            types[name] = "*fp32"
        elif name == "indices_ptr":
            types[name] = "*i16"
        elif name.endswith("_ptr"):
            types[name] = "*i32"
        elif name == "scale_log2":
            types[name] = "fp32"
        else:
            types[name] = "i32"
            aligned = name.startswith(("stride_q", "stride_k", "stride_v", "stride_out"))
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return types, attributes


def compile_portable(
    head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_sparsed.kernels.block_sparse_attention.kernel import block_sparse_forward

    config = tile_config(head_dim, dtype, block_size, capability)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    types, attributes = describe(block_sparse_forward, TYPE_NAMES[dtype], constants)
    return triton.compile(
        ASTSource(fn=block_sparse_forward, signature=types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def compile_hopper(head_dim: int, dtype: torch.dtype, block_size: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from vllm_sparsed.kernels.block_sparse_attention import hopper_kernel, hopper_pair_kernel

    config = hopper_config(head_dim, dtype, block_size, (9, 0))
    assert config is not None
    constants: dict[str, Any] = {"STAGES": config.stages, "num_warps": 4}
    if block_size < 64:
        kernel = hopper_pair_kernel.block_sparse_forward_sm90_pairs
    else:
        kernel = hopper_kernel.block_sparse_forward_sm90
        constants |= {"BLOCK_SIZE": block_size, "CONSUMER_REGISTERS": config.consumer_registers}
    types, attributes = describe(kernel, TYPE_NAMES[dtype], constants)
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    for name, rows in (("q", max(block_size, 64)), ("k", block_size), ("v", block_size)):
        layout = gl.NVMMASharedLayout.get_default_for([rows, head_dim], element)
        types[f"{name}_desc"] = f"tensordesc<{TYPE_NAMES[dtype]}[{rows}, {head_dim}],{layout!r}>"
    positions = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        GluonASTSource(kernel, types, positions, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": config.max_registers},
    )


def compile_lists(width: int) -> Any:
    """The kernel that gathers index lists for FlashAttention 4."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_sparsed.kernels.block_sparse_attention.list_kernel import gather_lists_kernel

    constants = {"PADDED_WIDTH": width}
    types, attributes = describe(gather_lists_kernel, "", constants)
    return triton.compile(
        ASTSource(fn=gather_lists_kernel, signature=types, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 2},
    )


def compile_window(
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    capability: tuple[int, int],
    fp8: bool,
) -> dict[str, Any]:
    """The kernels of the window attention over pages of 128 tokens."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_sparsed.kernels.window_attention import configs
    from vllm_sparsed.kernels.window_attention.kernel import combine_splits, window_forward

    config = configs.tile_config(head_dim, dtype, capability)
    way = ("native" if configs.has_fp8_conversion(capability) else "bits") if fp8 else ""
    shared = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "FP8": way,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    tile = {"BLOCK_SIZE": block_size, "PAGE_SIZE": 128}
    tile |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    suffix = ", fp8 pages" if fp8 else ""
    compiled = {}
    for name, kernel, constants, launch in (
        ("window", window_forward, shared | tile, options),
        ("combination", combine_splits, shared | {"ROWS": configs.COMBINED_ROWS}, {"num_warps": 4}),
    ):
        keys = {"": "", "native": "fp8e4nv", "bits": "u8"}[way]
        types, attributes = describe(kernel, TYPE_NAMES[dtype], constants, keys)
        compiled[name + suffix] = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32),
            options=launch,
        )
    return compiled


def local_memory(compiled: Any, folder: Path) -> int:
    """Bytes of local memory per thread: what did not fit into registers."""
    import triton

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [program, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return int(usage.split("STACK:")[1].split()[0])


def compile_case(case: list[Any], folder: Path, windows: bool) -> dict[str, dict[str, int]]:
    """Shared and local memory of every kernel that serves one entry of the table."""
    head_dim, type_name, block_size, capability = case[0], case[1], case[2], tuple(case[3])
    dtype = next(d for d, name in TYPE_NAMES.items() if name == type_name)
    if windows:
        kernels = compile_window(head_dim, dtype, block_size, capability, False)
        kernels |= compile_window(head_dim, dtype, block_size, capability, True)
    else:
        kernels = {"portable": compile_portable(head_dim, dtype, block_size, capability)}
        if hopper_config(head_dim, dtype, block_size, capability) is not None:
            kernels["hopper"] = compile_hopper(head_dim, dtype, block_size)
        if flash_attention_4.serves(head_dim, dtype, block_size, capability):
            kernels["lists"] = compile_lists(512)
    return {
        name: {"shared": compiled.metadata.shared, "local": local_memory(compiled, folder)}
        for name, compiled in kernels.items()
    }


def check(
    cases: list[tuple[int, torch.dtype, int, tuple[int, int]]], folder: Path, windows: bool = False
) -> None:
    request = {
        "folder": str(folder),
        "windows": windows,
        "cases": [(d, TYPE_NAMES[t], b, c) for d, t, b, c in cases],
    }
    # A process of its own: the interpreter replaces the compiler wherever it is switched on.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(cases)
    for case, kernels in zip(cases, results, strict=True):
        for kernel, usage in kernels.items():
            assert usage["shared"] <= SHARED_MEMORY[case[3]] * 1024, (case, kernel, usage)
            if case in NO_SPILLS and (kernel, case[3]) not in MAY_SPILL:
                assert usage["local"] == 0, (case, kernel, usage)


def test_usual_shapes(tmp_path: Path) -> None:
    assert {case[3] for case in REPRESENTATIVE} == set(CAPABILITIES)
    assert NO_SPILLS & set(REPRESENTATIVE)
    check(REPRESENTATIVE, tmp_path)


def test_usual_windows(tmp_path: Path) -> None:
    assert {case[3] for case in REPRESENTATIVE_WINDOWS} == set(CAPABILITIES)
    assert NO_SPILLS & set(REPRESENTATIVE_WINDOWS)
    check(REPRESENTATIVE_WINDOWS, tmp_path, windows=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("dtype", FLOATS, ids=TYPE_NAMES.get)
def test_whole_table(dtype: torch.dtype, capability: tuple[int, int], tmp_path: Path) -> None:
    cases = [(d, dtype, b, capability) for d, b in product(HEAD_DIMS, BLOCK_SIZES)]
    check(cases, tmp_path)
    check(cases, tmp_path, windows=True)


def main(request: dict[str, Any]) -> None:
    folder = Path(request["folder"])
    print(json.dumps([compile_case(case, folder, request["windows"]) for case in request["cases"]]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
