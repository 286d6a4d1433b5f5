"""Ask a diffusion language model a question without a server, with sparse attention.

python examples/offline_chat.py --model Dream-org/Dream-v0-Instruct-7B
"""

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="GSAI-ML/LLaDA-8B-Instruct")
    parser.add_argument("--question", default="Why is the sky blue?")
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
        max_tokens=128,
        temperature=0,
        extra_args={"diffusion_steps": 128, "diffusion_block_length": 32},
    )
    (output,) = model.chat([{"role": "user", "content": options.question}], parameters)
    print(output.outputs[0].text)


if __name__ == "__main__":
    main()
