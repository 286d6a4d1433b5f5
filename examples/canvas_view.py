"""Watch the canvas of a request fill in: its masks are redrawn as they are decided.

python examples/canvas_view.py --model GSAI-ML/LLaDA-8B-Instruct --max-tokens 128 --question 'Hi!'

A server streams only tokens whose predecessors are all decided. This runs the engine in its own
process and looks at the canvas between two steps. Without a terminal it prints a line per step.
"""

import argparse
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_sparsed.shown_canvas import ShownCanvas, token_texts

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
MASK = "░"  # an undecided position
FRESH, PLAIN = "\x1b[7m", "\x1b[0m"  # what the last step decided, in reverse video
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=32, help="length of the canvas")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--block-length", type=int, help="default: the whole canvas")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds between two pictures")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    # The engine in this process; vLLM reads both when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # A line of its log in between would tear the picture.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        attention_backend="sparsed",
        max_model_len=options.max_model_len,
        dtype=options.dtype,
        additional_config={"diffusion": {"show_canvas": True}},
    )
    tokenizer = llm.get_tokenizer()
    parameters = SamplingParams(
        max_tokens=options.max_tokens,
        temperature=0,
        ignore_eos=True,
        extra_args={
            "diffusion_steps": options.steps,
            "diffusion_block_length": options.block_length or options.max_tokens,
            "diffusion_show_canvas": True,
        },
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.question}],
        add_generation_prompt=True,
        return_dict=False,
    )
    show(canvases(llm, prompt, parameters), token_texts(tokenizer), options.delay)


def canvases(llm: Any, prompt: list[int], parameters: Any) -> Iterator[ShownCanvas]:
    """Run one request and yield its canvas after every engine step."""
    engine = llm.llm_engine
    engine.add_request("viewed", {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        engine.step()
        for fields in llm.collective_rpc("shown_canvases", args=("viewed",))[0]:
            yield ShownCanvas(**fields)


def show(pictures: Iterator[ShownCanvas], text: Callable[[int], str], delay: float) -> None:
    """Draw each canvas over the one before it; a line for each where there is no terminal."""
    terminal = sys.stdout.isatty()
    previous: ShownCanvas | None = None
    drawn = 0
    if terminal:
        print(end=HIDE_CURSOR)
    try:
        for canvas in pictures:
            if terminal:
                lines = render(canvas, previous, text, shutil.get_terminal_size().columns)
                # Up to the first line of the last picture, and away with all below.
                print((f"\x1b[{drawn}A" if drawn else "") + "\r\x1b[J" + "\n".join(lines))
                drawn = len(lines)
                time.sleep(delay)
            else:
                print(" ".join(render(canvas, None, text)), flush=True)
            previous = canvas
    finally:
        if terminal:
            print(end=SHOW_CURSOR, flush=True)


def render(
    canvas: ShownCanvas,
    previous: ShownCanvas | None,
    text: Callable[[int], str],
    width: int | None = None,
) -> list[str]:
    """Lines of a picture: the step, then the canvas.

    Args:
        canvas: what to draw.
        previous: the canvas before it; what is new since then is drawn in reverse video.
        text: of a token.
        width: columns of the terminal; None: the canvas is one line.
    """
    kind = "sparse" if canvas.is_sparse else "dense"
    head = (
        f"pass {canvas.passes:3}/{canvas.most_passes} {kind:6} "
        f"{canvas.num_decided:3}/{len(canvas.tokens)} decided"
    )
    earlier: Sequence[int | None] = previous.tokens if previous else (None,) * len(canvas.tokens)
    lines, column = [""], 0
    for token, before in zip(canvas.tokens, earlier, strict=True):
        cell = MASK if token is None else text(token)
        columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in cell)
        if width is not None and column + columns > width and column:
            lines.append("")
            column = 0
        column += columns
        fresh = width is not None and token is not None and before is None
        lines[-1] += f"{FRESH}{cell}{PLAIN}" if fresh else cell
    return [head if width is None else head[:width], *lines]


if __name__ == "__main__":
    main()
