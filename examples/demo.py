"""Serve a diffusion language model over HTTP, send it a prompt, print the answer as it streams in.

Without arguments the model is a small checkpoint with random weights from this repository: the
answer shows that serving, sparse attention and streaming work, and means nothing.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Final

from openai import OpenAI

# A script finds the modules beside it, not those of the repository's other folders.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.local_server import NAME, ServerError, served

CHECKPOINT: Final = Path(__file__).resolve().parent.parent / "tests" / "golden" / "llada-mha"
PROMPT: Final = "w16 w365 w116 w266 w72 w23 w214"
LOG_TAIL: Final = 40  # lines of the server's log that a failed start shows


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hugging Face name")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the canvas")
    parser.add_argument("--block-length", type=int, default=16, help="tokens decided at a time")
    parser.add_argument(
        "--steps", type=int, default=64, help="denoising steps, all blocks together"
    )
    parser.add_argument("server_options", nargs="*", help="after --: more options for vllm serve")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end_on_signal)
    with tempfile.TemporaryDirectory(prefix="vllm-sparsed-demo-") as folder:
        model = options.model
        if Path(model).is_dir() and not (Path(model) / "tokenizer_config.json").exists():
            model = str(copy_with_tokenizer(Path(model), Path(folder) / "model"))
            print(
                f"{options.model} has random weights and no tokenizer: token 7 is written w7 here,"
                " and the answer means nothing."
            )
        log = Path(folder) / "server.log"
        try:
            # The checkpoints in this repository are meant for float32.
            small = ["--dtype", "float32", "--max-model-len", "512"] if Path(model).is_dir() else []
            with served(model, [*small, *options.server_options], log) as address:
                print(f"\nPrompt: {options.prompt}\nAnswer: ", end="", flush=True)
                stream_answer(address, options)
        except ServerError as error:
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([*tail, f"{error} The end of its log is above."]), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted; the server has been stopped.", file=sys.stderr)
            return 130
    print("The server has been stopped.")
    return 0


def end_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave through the with statements, so that the server is stopped."""
    sys.exit(128 + number)


def stream_answer(address: str, options: argparse.Namespace) -> None:
    """Send the prompt and print each piece of the answer as it arrives, with its time."""
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    start = time.perf_counter()
    stream = client.completions.create(
        model=NAME,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "ignore_eos": True,
            "vllm_xargs": {
                "diffusion_steps": options.steps,
                "diffusion_block_length": options.block_length,
            },
        },
    )
    pieces = tokens = 0
    for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            pieces += 1
            print(
                f"\n  [{time.perf_counter() - start:5.2f} s] {chunk.choices[0].text}",
                end="",
                flush=True,
            )
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    elapsed = time.perf_counter() - start
    print(f"\n{tokens} tokens in {pieces} pieces, {elapsed:.2f} s\n")
    if not pieces:
        raise ServerError("The server answered with no text.")


def copy_with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint to folder and add a tokenizer in which token 7 is the word "w7".

    The mask token is special, so that it does not show in decoded text. Returns folder.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    vocabulary = {f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    mask, end = f"w{config['mask_token_id']}", f"w{config['eos_token_id']}"
    tokenizer.add_special_tokens([mask, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": mask,
        "eos_token": end,
        "model_max_length": config.get("max_sequence_length"),
        "clean_up_tokenization_spaces": False,
        # Messages one after another, roles left out: enough to try the chat interface.
        "chat_template": "{{ messages | map(attribute='content') | join(' ') }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


if __name__ == "__main__":
    sys.exit(main())
