"""Requests with different settings, all in one batch of one engine.

python examples/request_settings.py --model GSAI-ML/LLaDA-8B-Instruct --question 'Who was Euler?'
"""

import argparse
import json
from pathlib import Path
from typing import Any, Final

from vllm import LLM, SamplingParams

# This repository's own: it knows no other words than those of its documents.
SMALL_MODEL = str(Path(__file__).resolve().parents[1] / "llada-yardstick-6m")
# Facts that no model knows: the answer can only come from the text.
QUESTION = (
    "The access code of the amber lantern is 90571426.\n"
    "The access code of the quiet harbor is 48219036.\n"
    "The access code of the bronze bridge is 031687245093.\n"
    "The access code of the hidden garden is 759238610427.\n"
    "What is the access code of the quiet harbor?"
)
SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    {},  # the server's defaults
    {"sparsed_enabled": False},
    {"sparsed_select": 0.5, "sparsed_skip": 0.0},
    {"sparsed_select": 0.1, "sparsed_block_size": 64},
    {"diffusion_steps": 8},
    {"diffusion_block_length": 8},
    {"diffusion_alg": "entropy"},
    {"diffusion_alg": "random", "diffusion_steps": 16, "sparsed_block_size": 32},
    {"diffusion_cfg_scale": 0.5},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=32, help="length of the canvas")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model = LLM(
        options.model,
        attention_backend="sparsed",
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        # A request may ask for no more than the engine's select and no less than its block size.
        additional_config={"sparsed": {"select": 0.5, "block_size": 32}},
    )
    parameters = [
        SamplingParams(max_tokens=options.max_tokens, temperature=0, seed=0, extra_args=settings)
        for settings in SETTINGS
    ]
    conversation = [{"role": "user", "content": options.question}]
    outputs = model.chat([conversation] * len(SETTINGS), parameters)
    for settings, output in zip(SETTINGS, outputs, strict=True):
        print(f"{output.outputs[0].text!r:24} {json.dumps(settings)}")


if __name__ == "__main__":
    main()
