"""Ahead-of-time compilation of the kernels beside attention for every supported chip; no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_sparsed.kernels.confidence_ranking import configs as ranking
from vllm_sparsed.kernels.counter_random import configs as random_numbers
from vllm_sparsed.kernels.fp8_rows import wrapper as fp8_rows
from vllm_sparsed.kernels.logit_cutoff import configs as cutoff
from vllm_sparsed.kernels.rotary_embedding import wrapper as rotary
from vllm_sparsed.kernels.silu_and_mul import wrapper as silu
from vllm_sparsed.kernels.token_confidence import configs as confidence

CAPABILITIES = ("sm_80", "sm_90")
FLOAT64 = {"temperature_ptr", "uniform_ptr", "probability_ptr", "bound_ptr", "top_p_ptr"}
INT64 = {
    *("positions_ptr", "seed_ptr", "step_ptr", "position_ptr", "candidates_ptr", "tokens_ptr"),
    *("group_ptr", "first_ptr", "rule_ptr", "quota_ptr", "order_ptr", "top_k_ptr"),
}

FP8_ROWS = {
    **dict.fromkeys(("gate_up_ptr", "x_ptr", "residual_ptr", "weight_ptr"), "bf16"),
    "out_ptr": "fp8e4nv",
    "scales_ptr": "fp32",
}
WITH_FP8 = ("sm_90",)


def variants(capability: str) -> list[tuple[str, str, dict[str, Any], dict[str, str], int]]:
    """Module, kernel, constants, types of pointers that are neither float64 nor int64, warps."""
    found: list[tuple[str, str, dict[str, Any], dict[str, str], int]] = []
    for dtype in ("bf16", "fp32"):
        types = {"query_ptr": dtype, "key_ptr": dtype, "cos_sin_ptr": "fp32"}
        for num_heads, num_kv_heads, half in ((32, 32, 64), (28, 4, 64), (4, 4, 40)):
            constants = {
                "NUM_HEADS": num_heads,
                "NUM_KV_HEADS": num_kv_heads,
                "HALF": half,
                "BLOCK_HALF": 64,
                "BLOCK_HEADS": rotary.BLOCK_HEADS,
            }
            found.append(
                ("rotary_embedding", "rotary_embedding_kernel", constants, types, rotary.NUM_WARPS)
            )
    constants = {"WIDTH": 12288, "BLOCK": silu.BLOCK}
    types = {"gate_up_ptr": "bf16", "out_ptr": "bf16"}
    found.append(("silu_and_mul", "silu_and_mul_kernel", constants, types, silu.NUM_WARPS))
    if capability in WITH_FP8:
        for width in (12288, 18944):
            first, rest = fp8_rows.tiles(width)
            constants = {"WIDTH": width, "FIRST": first, "REST": rest}
            found.append(
                ("fp8_rows", "silu_and_mul_fp8_kernel", constants, FP8_ROWS, fp8_rows.GATE_WARPS)
            )
        for added in (True, False):
            constants = {"ADDED": added, "WIDTH": 4096, "BLOCK": 4096}
            found.append(
                ("fp8_rows", "rms_norm_fp8_kernel", constants, FP8_ROWS, fp8_rows.NORM_WARPS)
            )
    for statistic in confidence.Statistic:
        for drawn, cut, shaped in (
            (False, False, False),
            (True, False, False),
            (True, False, True),
            (True, True, False),
            (True, True, True),
            (False, True, True),
        ):
            constants = {
                "STATISTIC": int(statistic),
                "DRAWN": drawn,
                "CUT": cut,
                "SHAPED": shaped,
                "STREAM_KEY": random_numbers.stream_key(0),
                "BLOCK": confidence.DRAW_BLOCK if drawn else confidence.BLOCK,
            }
            types = {"logits_ptr": "bf16", "values_ptr": "fp32", "cutoff_ptr": "fp32"}
            kernel = ("token_confidence", "token_confidence_kernel")
            found.append((*kernel, constants, types, confidence.NUM_WARPS))
    for dtype in ("bf16", "fp32"):
        for top_p, top_k in ((True, False), (False, True), (True, True)):
            constants = {
                "SCALED": True,
                "TOP_P": top_p,
                "TOP_K": top_k,
                "BLOCK": cutoff.BLOCK,
                "WAYS": cutoff.WAYS,
            }
            types = {"logits_ptr": dtype, "out_ptr": "fp32"}
            kernel = ("logit_cutoff", "logit_cutoff_kernel")
            found.append((*kernel, constants, types, cutoff.NUM_WARPS))
    constants = {"STREAM_KEY": random_numbers.stream_key(3), "BLOCK": random_numbers.BLOCK}
    found.append(("counter_random", "uniform_rows_kernel", constants, {"out_ptr": "fp64"}, 4))
    for dtype, rules in (("fp32", False), ("fp64", False), ("fp32", True), ("fp64", True)):
        constants = {
            "HAS_RULES": rules,
            "HAS_CHANCE": True,
            "HAS_ORDER": True,
            "ENTROPY_UNIT": ranking.ENTROPY_UNIT,
            "BLOCK_CANDIDATES": ranking.BLOCK_CANDIDATES,
            "BLOCK_OTHERS": ranking.RULES_BLOCK_OTHERS if rules else ranking.BLOCK_OTHERS,
        }
        types = {"confidence_ptr": dtype, "out_ptr": "i64"}
        found.append(("confidence_ranking", "decide_kernel", constants, types, ranking.NUM_WARPS))
    return found


def compile_all(capability: str, folder: Path) -> list[tuple[str, int, int]]:
    """Kernel, shared memory and bytes of local memory per thread of each variant."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", int(capability.removeprefix("sm_")), 32)
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    results = []
    for module, name, constants, types, num_warps in variants(capability):
        kernel = getattr(importlib.import_module(f"vllm_sparsed.kernels.{module}.kernel"), name)
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument.endswith("_ptr"):
                known = "fp64" if argument in FLOAT64 else "i64" if argument in INT64 else ""
                signature[argument] = f"*{types.get(argument) or known}"
            elif argument == "epsilon":
                signature[argument] = "fp32"
            else:
                signature[argument] = "i32"
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [program, "-res-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        stack = int(usage.split("STACK:")[1].split()[0])
        results.append((f"{name} {constants} {types}", compiled.metadata.shared, stack))
    return results


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles(capability: str, tmp_path: Path) -> None:
    """In a process of its own: the interpreter replaces the compiler in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, capability, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(variants(capability))
    for name, shared, stack in results:
        assert shared <= 48 * 1024, name
        # The logarithms in float64 keep a few words of their tables there.
        assert stack <= 64, name


if __name__ == "__main__":
    print(json.dumps(compile_all(sys.argv[1], Path(sys.argv[2]))))
