"""Ask a diffusion language model a question without a server, with sparse attention.

python examples/offline_chat.py --model Dream-org/Dream-v0-Instruct-7B --question 'Who was Euler?'
"""

import argparse
from pathlib import Path

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
    )
    # max_tokens is the length of the canvas: every step refines all of its positions.
    parameters = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=0,
        extra_args={"diffusion_steps": options.max_tokens, "diffusion_block_length": 32},
    )
    (output,) = model.chat([{"role": "user", "content": options.question}], parameters)
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
