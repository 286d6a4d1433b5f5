"""Chat with a running server through the openai client.

Start the server first, for instance

    vllm serve GSAI-ML/LLaDA-8B-Instruct --attention-backend sparsed
"""

import argparse

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="http://localhost:8000/v1")
    parser.add_argument("--question", default="Why is the sky blue?")
    options = parser.parse_args()
    client = OpenAI(base_url=options.address, api_key="unused")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": options.question}],
        max_tokens=128,
        # Parameters that the openai interface has no name for travel in vllm_xargs.
        extra_body={"vllm_xargs": {"diffusion_steps": 64, "diffusion_block_length": 32}},
    )
    print(answer.choices[0].message.content)
    if answer.usage is not None:
        print(f"{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
