"""Ahead-of-time compilation of the pattern kernels for every supported chip; needs no GPU."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_sparsed.kernels.block_importance.configs import tile_config
from vllm_sparsed.kernels.block_selection.configs import TABLE as SELECTION_TABLE
from vllm_sparsed.kernels.devices import FLOATS
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES, CAPABILITIES, HEAD_DIMS

# Shared memory that one program can have, in KiB.
SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227}
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# head_dim, dtype, block size, compute capability: the usual shapes and the largest tiles.
REPRESENTATIVE = [
    (128, torch.bfloat16, 128, (9, 0)),
    (128, torch.bfloat16, 32, (9, 0)),
    (256, torch.float16, 128, (9, 0)),
    (128, torch.bfloat16, 128, (8, 0)),
    (256, torch.bfloat16, 128, (8, 0)),
    (128, torch.float16, 32, (8, 6)),
    (256, torch.bfloat16, 128, (8, 9)),
    (128, torch.float32, 128, (8, 9)),
]
# bfloat16 shapes whose registers must hold everything on Hopper.
NO_SPILLS = [(head_dim, block_size) for head_dim in (64, 128) for block_size in BLOCK_SIZES]


def signature(kernel: Any, constants: dict[str, Any], dtype: str, tma: bool) -> tuple[dict, dict]:
    """Argument types by name, and the divisibility that the wrapper's launches have."""
    types: dict[str, str] = {}
    attributes = {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in ("q_source", "k_source"):
            rows = constants["BLOCK_M" if argument == "q_source" else "BLOCK_N"]
            types[argument] = (
                f"tensordesc<{dtype}[{rows}, {constants['HEAD_DIM']}]>" if tma else f"*{dtype}"
            )
            if not tma:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif argument in ("scale_log2", "lse_factor", "lse_factor_low"):
            types[argument] = "fp32"
        elif argument in ("pattern_rows_ptr", "counts_ptr"):
            types[argument] = "*i32"
        elif argument == "indices_ptr":
            types[argument] = "*i16"
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32"
        else:
            types[argument] = "i32"
            if argument.startswith(("q_stride", "k_stride")):
                attributes[(position,)] = [["tt.divisibility", 16]]
    return types, attributes


def compile_kernel(kernel: Any, capability: tuple[int, int], constants: dict, **options: Any):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtype = options.pop("dtype", "fp32")
    types, attributes = signature(kernel, constants, dtype, constants.get("TMA", False))
    present = {n: v for n, v in constants.items() if n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=present, attrs=attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    return triton.compile(source, target=target, options=options)


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


def compile_importance(case: list, folder: Path) -> dict[str, dict[str, int]]:
    """Shared memory and spills of the kernels of one entry of the table."""
    from vllm_sparsed.kernels.block_importance.kernel import (
        block_importance_kernel,
        row_statistics_kernel,
    )

    head_dim, type_name, block_size, capability = case
    dtype = next(d for d, n in TYPE_NAMES.items() if n == type_name)
    config = tile_config(head_dim, dtype, block_size, tuple(capability))
    constants = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_MAIN": 1 << (head_dim.bit_length() - 1),
        "CHUNK": config.chunk,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": config.tma,
        "FULL": True,
        "LSE_GIVEN": True,
    }
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    results = {}
    for kernel in (block_importance_kernel, row_statistics_kernel):
        compiled = compile_kernel(kernel, tuple(capability), constants, dtype=type_name, **options)
        results[kernel.__name__] = {
            "shared": compiled.metadata.shared,
            "local": local_memory(compiled, folder),
        }
    return results


def compile_selection(capability: list) -> dict[str, int]:
    """Shared memory of the selection kernel by width."""
    from vllm_sparsed.kernels.block_selection.kernel import select_blocks_kernel

    return {
        str(width): compile_kernel(
            select_blocks_kernel, tuple(capability), {"WIDTH": width}, num_warps=warps
        ).metadata.shared
        for width, warps in SELECTION_TABLE.items()
    }


def in_subprocess(request: dict[str, Any]) -> Any:
    """Run this file without the interpreter, which replaces the compiler in its whole process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), *filter(None, [environment.get("PYTHONPATH")])]
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
    return json.loads(done.stdout.splitlines()[-1])


def check(cases: list[tuple], folder: Path) -> None:
    request = {
        "folder": str(folder),
        "importance": [(d, TYPE_NAMES[t], b, c) for d, t, b, c in cases],
    }
    results = in_subprocess(request)
    assert len(results) == len(cases)
    for case, kernels in zip(cases, results, strict=True):
        head_dim, dtype, block_size, capability = case
        for kernel, usage in kernels.items():
            assert 0 < usage["shared"] <= SHARED_MEMORY[capability] * 1024, (case, kernel, usage)
            if (
                capability == (9, 0)
                and dtype == torch.bfloat16
                and (head_dim, block_size) in NO_SPILLS
            ):
                # A few words of addresses may go to local memory outside the loops.
                assert usage["local"] <= 128, (case, kernel, usage)


def test_importance_compiles_for_every_chip(tmp_path: Path) -> None:
    assert {case[3] for case in REPRESENTATIVE} == set(CAPABILITIES)
    check(REPRESENTATIVE, tmp_path)


def test_selection_compiles(tmp_path: Path) -> None:
    shared = in_subprocess({"selection": [8, 6]})
    assert set(shared) == {str(width) for width in SELECTION_TABLE}
    assert max(shared.values()) <= SHARED_MEMORY[8, 6] * 1024


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("dtype", FLOATS, ids=TYPE_NAMES.get)
def test_whole_table(dtype: torch.dtype, capability: tuple[int, int], tmp_path: Path) -> None:
    shapes = itertools.product(HEAD_DIMS, BLOCK_SIZES)
    check([(d, dtype, b, capability) for d, b in shapes], tmp_path)
    in_subprocess({"selection": capability})


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if "selection" in arguments:
        print(json.dumps(compile_selection(arguments["selection"])))
    else:
        target_folder = Path(arguments["folder"])
        print(json.dumps([compile_importance(c, target_folder) for c in arguments["importance"]]))
