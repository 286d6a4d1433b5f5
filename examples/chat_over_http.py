"""Chat with a running server through the openai client.

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
    options = parser.parse_args()
    client = OpenAI(base_url=options.address, api_key="unused")
    answer = client.chat.completions.create(
        model=options.model or client.models.list().data[0].id,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=options.max_tokens,
        # Parameters that the openai interface has no name for travel in vllm_xargs.
        extra_body={"vllm_xargs": {"diffusion_steps": 16, "diffusion_block_length": 32}},
    )
    print(answer.choices[0].message.content)
    if answer.usage is not None:
        print(f"{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
