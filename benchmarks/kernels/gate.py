"""Times SwiGLU's gate against vLLM's operation, which it must beat to stay.

    python -m benchmarks.kernels.gate

Both are checked against float64 first; prints microseconds (median) and the rate of bytes.
"""

import argparse
from functools import partial
from typing import Final

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul

from benchmarks.measuring.environment import headline
from benchmarks.measuring.timing import time_calls
from vllm_sparsed.kernels.silu_and_mul import silu_and_mul

WIDTHS: Final = {"llada-8b": 12288, "dream-7b": 18944}
TOKENS: Final = (64, 256, 1024, 4096, 16384, 65536)
BUDGET_MS: Final = 200.0


def check(gate_up: Tensor, out: Tensor) -> None:
    """Compare with float64.

    Raises:
        AssertionError: an element is off by more than one rounding of bfloat16.
    """
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=1e-6)


def main() -> None:
    """Print one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a size for CPUs")
    small = parser.parse_args().small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(headline())
    with set_current_vllm_config(VllmConfig()):
        theirs = SiluAndMul()
    for name, width in WIDTHS.items():
        for tokens in TOKENS[:1] if small else TOKENS:
            gate_up = torch.randn(tokens, 2 * width, device=device, dtype=torch.bfloat16)
            check(gate_up[:64], silu_and_mul(gate_up[:64]))
            check(gate_up[:64], theirs(gate_up[:64]))
            ours = time_calls(partial(silu_and_mul, gate_up), device, BUDGET_MS).p50
            vllm = time_calls(partial(theirs, gate_up), device, BUDGET_MS).p50
            rate = 3 * tokens * width * 2 / (ours * 1e-3) / 1e12
            print(
                f"{name:10} {tokens:6} tokens: ours {ours * 1e3:8.1f} us ({rate:.2f} TB/s), "
                f"vLLM {vllm * 1e3:8.1f} us, vLLM / ours {vllm / ours:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
