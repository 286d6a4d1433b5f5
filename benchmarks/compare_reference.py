"""Compares a checkpoint served by this package with the reference loop, step by step.

The reference is the checkpoint's own modelling code in transformers where there is any, else the
plain PyTorch model of `benchmarks.reference`, under the plain loops of
`benchmarks.reference.generate`. vLLM then runs the same request one denoising step at a time in
this process. Printed are the positions and tokens that each step decides, how far the logits of
some forward passes are apart, and where the two part company: how narrow the decision was there.

    python -m benchmarks.compare_reference GSAI-ML/LLaDA-8B-Instruct --prompt "What is 2+2?" --chat
    python -m benchmarks.compare_reference tests/golden/llada-mha --prompt-ids 16,365,116 \
        --dtype float32 --canvas 32 --steps 16 --block-length 32
    python -m benchmarks.compare_reference GSAI-ML/LLaDA-8B-Instruct --prompt "What is 2+2?" \
        --chat --block-length 32 --threshold 0.9

With a pace (--threshold, --factor, --entropy-bound or --entropy-threshold) every decision whose
margin is below what the difference of the logits may move is marked with a ~.

Exit status: 0 where the tokens are the same or the first difference is a near tie, else 1.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.reference.generate import (
    DenoisedSequence,
    Request,
    Sampling,
    Step,
    generate_dream,
    generate_llada,
)
from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.paced import Pace, generate_paced
from benchmarks.reference.served import (
    DREAM_ALGORITHMS,
    LLADA_ALGORITHMS,
    RELEASED_TOKENS,
    LogitsSample,
    ServedRun,
    Task,
    run_served,
    served_noise,
)
from benchmarks.reference.sparse_pattern import (
    PacedSparseSequence,
    SparseSequence,
    SparseSettings,
)
from benchmarks.reference.transformers_model import (
    TransformersSequence,
    has_modelling_code,
    load_transformers_model,
)

PACES = ("threshold", "factor", "entropy_bound", "entropy_threshold")


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference did."""

    steps: list[Step]
    samples: list[LogitsSample]
    final: list[int]


def main() -> int:
    arguments = parse_arguments()
    task = make_task(arguments)
    dtype = getattr(torch, arguments.dtype)
    reference = run_reference(task, arguments.reference, dtype, arguments.device, arguments.samples)
    served = run_served(
        task,
        reference.samples,
        dtype=arguments.dtype,
        attention_backend=arguments.attention_backend,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
    )
    return report(task, reference, served)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder or name of a LLaDA or Dream checkpoint")
    add("--prompt", help="text; needs the checkpoint's tokenizer")
    add("--chat", action="store_true", help="put the text through the chat template")
    add("--prompt-ids", help="token ids, separated by commas")
    add("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--reference", default="auto", choices=("auto", "transformers", "plain"))
    add("--canvas", type=int, default=64, help="tokens to generate")
    add("--steps", type=int, help="denoising steps, with a pace at most; default: the canvas")
    for name in PACES:
        add(f"--{name.replace('_', '-')}", type=float, help="decide by it in place of a schedule")
    add("--block-add", type=float, help="several blocks at once: share that opens the next one")
    add("--block-full", type=float, default=0.95, help="share from which on a block must advance")
    add("--block-length", type=int, help="LLaDA's blocks; default: the canvas")
    add("--alg", choices=(*LLADA_ALGORITHMS, *DREAM_ALGORITHMS), help="default: the model's own")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0, help="Dream's algorithms only")
    add("--top-k", type=int, default=0, help="Dream's algorithms only")
    add("--alg-temp", type=float, default=0.0)
    add("--eps", type=float, default=1e-3)
    add("--cfg-scale", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--skip", type=float, help="SparseD's share of dense steps; default: all are dense")
    add("--select", type=float, default=0.3, help="SparseD's share of kept blocks")
    add("--block-size", type=int, default=128, help="SparseD's block of tokens")
    add("--samples", type=int, default=4, help="forward passes whose logits are compared")
    add("--attention-backend", default="sparsed", help="vLLM's backend")
    add("--tensor-parallel-size", type=int, default=1)
    add("--gpu-memory-utilization", type=float, default=0.9)
    return parser.parse_args()


def make_task(arguments: argparse.Namespace) -> Task:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(arguments.model)
    architecture = config["architectures"][0]
    if architecture not in RELEASED_TOKENS:
        raise SystemExit(f"{architecture} is neither LLaDAModelLM nor DreamModel")
    own = "low_confidence" if architecture == "LLaDAModelLM" else "origin"
    return Task(
        model=arguments.model,
        config=config,
        prompt=prompt_ids(arguments),
        canvas=arguments.canvas,
        steps=arguments.steps or arguments.canvas,
        block_length=arguments.block_length or arguments.canvas,
        alg=arguments.alg or own,
        sampling=Sampling(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            alg_temp=arguments.alg_temp,
            cfg_scale=arguments.cfg_scale,
        ),
        eps=arguments.eps,
        seed=arguments.seed,
        sparse=None
        if arguments.skip is None
        else SparseSettings(arguments.skip, arguments.select, arguments.block_size),
        pace=make_pace(arguments),
    )


def make_pace(arguments: argparse.Namespace) -> Pace | None:
    given = [name for name in PACES if getattr(arguments, name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise SystemExit(f"--{given[0]} and --{given[1]} do not go together".replace("_", "-"))
    return Pace(
        given[0],
        getattr(arguments, given[0]),
        arguments.block_length or arguments.canvas,
        arguments.steps,
        margin=arguments.alg == "topk_margin",
        block_add=arguments.block_add,
        block_full=arguments.block_full,
    )


def prompt_ids(arguments: argparse.Namespace) -> list[int]:
    if arguments.prompt_ids is not None:
        return [int(token) for token in arguments.prompt_ids.split(",")]
    if arguments.prompt is None:
        raise SystemExit("give --prompt or --prompt-ids")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=True)
    text = arguments.prompt
    if arguments.chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=not arguments.chat)
    return ids


@torch.inference_mode()
def run_reference(
    task: Task, kind: str, dtype: torch.dtype, device: str, num_samples: int
) -> ReferenceRun:
    """Run the reference loop, and some of its forward passes again for their logits."""
    if kind == "auto":
        kind = "transformers" if has_modelling_code(task.config, task.model) else "plain"
    if kind == "transformers" and task.sparse is not None:
        raise SystemExit("the modelling code has no SparseD: compare with --reference plain")
    total_steps = sum(steps for _, steps in task.blocks)
    new_sequence: Any
    if kind == "transformers":
        model = load_transformers_model(task.model, dtype, device)

        def new_sequence() -> DenoisedSequence:
            return TransformersSequence(model)
    else:
        plain = ReferenceModel.load(local_folder(task.model), dtype, device)

        def new_sequence() -> DenoisedSequence:
            if task.pace is not None:
                return PacedSparseSequence(plain, task.canvas, task.mask_token_id, task.sparse)
            return SparseSequence(plain, task.canvas, total_steps, task.sparse)

    print(f"reference: {kind}, {dtype} on {device}")
    request = Request(
        new_sequence=new_sequence,
        prompt=torch.tensor(task.prompt, device=device),
        canvas_len=task.canvas,
        mask_token_id=task.mask_token_id,
        logit_shift=task.architecture == "DreamModel",
        sampling=task.sampling,
        noise=served_noise(task.seed),
    )
    if task.pace is not None:
        steps = generate_paced(request, task.pace)
    elif task.alg in LLADA_ALGORITHMS:
        steps = generate_llada(
            request, steps=task.steps, block_length=task.block_length, alg=task.alg
        )
    else:
        steps = generate_dream(request, steps=task.steps, alg=task.alg, eps=task.eps)
    final = steps[-1].before.tolist()
    for position, token in zip(steps[-1].positions, steps[-1].tokens, strict=True):
        final[position] = token

    chosen = sorted(
        {round(i * (len(steps) - 1) / max(1, num_samples - 1)) for i in range(num_samples)}
    )
    rows = torch.arange(len(task.prompt), len(final))
    samples = [
        LogitsSample(
            step=step,
            tokens=steps[step].before.cpu(),
            rows=rows,
            logits=new_sequence().logits(steps[step].before, 0)[rows.to(device)].float().cpu(),
        )
        for step in chosen
    ]
    return ReferenceRun(steps, samples, final)


def local_folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))


def report(task: Task, reference: ReferenceRun, served: ServedRun) -> int:
    """Print the comparison; returns the exit status."""
    print("\nlogits of a dense forward pass, canvas rows: largest and mean difference, same argmax")
    largest = 0.0
    for sample, logits in zip(reference.samples, served.logits, strict=True):
        difference = (sample.logits - logits).abs()
        same = (sample.logits.argmax(dim=-1) == logits.argmax(dim=-1)).double().mean()
        largest = max(largest, float(difference.max()))
        print(
            f"  step {sample.step:4d}: {float(difference.max()):.3e}  "
            f"{float(difference.mean()):.3e}  {float(same):.4f}"
        )

    vocabulary = reference.samples[0].logits.shape[1]
    rounding = order_rounding(task.pace, largest, vocabulary)
    near_ties = 0
    print("\nstep: position=token decided by the reference | by vLLM, where not the same")
    first: int | None = None
    before = [*task.prompt, *[task.mask_token_id] * task.canvas]
    for step in reference.steps:
        expected = dict(zip(step.positions, step.tokens, strict=True))
        if step.index < len(served.after):
            now = served.after[step.index]
            got = {i: b for i, (a, b) in enumerate(zip(before, now, strict=True)) if a != b}
            before = now
        else:
            got = {}
        # A mask that was the candidate is a decision that changes nothing.
        expected = {p: t for p, t in expected.items() if t != task.mask_token_id}
        mark = "" if got == expected else f" | {written(got)}"
        if mark and first is None:
            first = step.index
        tie = task.pace is not None and step.order_margin <= rounding
        near_ties += tie
        print(f"  {step.index:4d}:{'~' if tie else ' '}{written(expected)}{mark}")

    canvas = reference.final[len(task.prompt) :]
    equal = sum(a == b for a, b in zip(canvas, served.output, strict=False))
    print(f"\nreference: {canvas}\nvLLM:      {served.output}")
    print(f"{equal} of {len(canvas)} tokens are the same")
    if task.pace is not None:
        print(
            f"{len(reference.steps)} passes, {len(canvas) / len(reference.steps):.2f} tokens each; "
            f"in {near_ties} the margin of a decision is below {rounding:.3e}, which rounding may "
            "move (marked ~)"
        )
    if first is None and served.output == canvas:
        print("identical, step by step")
        return 0
    if first is None:
        print("every step agrees, but not the output")
        return 1
    step = reference.steps[first]
    near = step.token_margin <= 2 * largest or step.order_margin <= rounding
    print(
        f"first difference at step {first}: the reference chose its tokens by at least "
        f"{step.token_margin:.3e} in logits and its positions by {step.order_margin:.3e} in "
        f"confidence; logits differ by up to {largest:.3e}: "
        + ("a near tie, decided by rounding" if near else "NOT explained by rounding")
    )
    return 0 if near else 1


def order_rounding(pace: Pace | None, difference: float, vocabulary: int) -> float:
    """By how much logits that are off by `difference` may move what a decision's margin is of.

    A probability p moves by at most p (exp(2 d) - 1), an entropy H by about 2 d H (the mean
    absolute deviation of -log p is at most twice its mean), a sum of entropies alike.
    """
    if pace is None or not pace.name.startswith("entropy"):
        return math.expm1(2 * difference)
    return 2 * difference * (pace.value + math.log(vocabulary))


def written(decisions: dict[int, int]) -> str:
    return " ".join(f"{position}={token}" for position, token in sorted(decisions.items())) or "-"


if __name__ == "__main__":
    sys.exit(main())
