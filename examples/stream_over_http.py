"""Print an answer from a running server piece by piece, as its tokens become final.

Start the server first, for instance

    vllm serve llada-yardstick-6m --attention-backend sparsed
"""

import argparse

from openai import OpenAI

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
    parser.add_argument("--address", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="default: the first that the server has")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=32, help="length of the canvas")
    parser.add_argument(
        "--block-length",
        type=int,
        default=8,
        help="tokens; a smaller block streams sooner and more evenly",
    )
    options = parser.parse_args()
    client = OpenAI(base_url=options.address, api_key="unused")
    stream = client.chat.completions.create(
        model=options.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=options.max_tokens,
        stream=True,
        extra_body={"vllm_xargs": {"diffusion_block_length": options.block_length}},
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
