"""Print a completion from a running server block by block, as its blocks become final.

Start the server first, for instance

    vllm serve GSAI-ML/LLaDA-8B-Instruct --attention-backend sparsed
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://localhost:8000/v1")
    parser.add_argument("--prompt", default="The sky is blue because")
    parser.add_argument(
        "--block-length",
        type=int,
        default=16,
        help="a smaller block streams sooner and more evenly",
    )
    options = parser.parse_args()
    client = OpenAI(base_url=options.address, api_key="unused")
    stream = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=options.prompt,
        max_tokens=128,
        stream=True,
        extra_body={"vllm_xargs": {"diffusion_block_length": options.block_length}},
    )
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
