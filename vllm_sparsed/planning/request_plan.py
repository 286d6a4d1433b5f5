"""What one request costs and how its denoising steps are laid out.

The scheduler (in the engine core) and the model runner (in every worker) both derive the same plan
from the request alone, so nothing of it has to travel between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_sparsed.config.parameters import RequestParameters, request_parameters
from vllm_sparsed.config.settings import EngineSettings
from vllm_sparsed.kernels.pattern_building import generation_start_block, kept_blocks_bound
from vllm_sparsed.planning.blocks import Block, pattern_step, plan_blocks
from vllm_sparsed.planning.crossover import Prediction

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """Canvas, denoising steps and reserved resources of one request.

    Attributes:
        prompt_len: tokens of the prompt.
        canvas_len: mask tokens appended to it, G in SparseD's notation.
        parameters: the request's validated parameters.
        blocks: semi-autoregressive blocks of the canvas, left to right.
        num_steps: denoising steps of the whole request, T; with a pace the most that it may take.
        block_size: tokens of a block of its patterns.
        select: share of the key blocks that they keep, rho.
        pattern_step: t*, the last dense step, in which the patterns are built; steps after it are
            sparse. -1 where the request stays dense, and with a pace, where it is not known yet.
        prediction: with a pace and pattern rows: times by which the worker decides, once enough of
            the canvas is decided, whether the rest is sparse; None: it is.
        guided: whether a second, unconditional sequence runs beside the first (guidance).
        step_tokens: tokens that a step of the request takes of the step's token budget.
        num_pattern_rows: rows of the pattern store the request takes, or may take with a pace (0:
            stays dense).
        attention: how it attends and why, for the log.
    """

    prompt_len: int
    canvas_len: int
    parameters: RequestParameters
    blocks: tuple[Block, ...]
    num_steps: int
    block_size: int
    select: float
    pattern_step: int
    prediction: Prediction | None
    guided: bool
    step_tokens: int
    num_pattern_rows: int
    attention: str

    @property
    def seq_len(self) -> int:
        """Tokens of one sequence: prompt and canvas."""
        return self.prompt_len + self.canvas_len

    @property
    def num_sequences(self) -> int:
        return 2 if self.guided else 1

    def is_sparse_step(self, step: int) -> bool:
        return 0 <= self.pattern_step < step


def plan_request(
    prompt_token_ids: Sequence[int], sampling_params: "SamplingParams", settings: EngineSettings
) -> RequestPlan:
    """Lay out the denoising of one request.

    Rules where prompt and parameters together ask for what cannot be: the canvas is clamped to the
    context that the prompt leaves; a block never gets more steps than it has masks nor fewer than
    one; a guided request of which two sequences do not fit the token budget takes that of one, and
    its halves run in turn; a request whose patterns have more rows or wider ones than the whole
    store stays dense, and so does one that sparse attention would not make faster
    (`sparsed.dense_if_faster`).

    Raises:
        ParameterError: a parameter that the front end's check would have refused.
    """
    parameters = request_parameters(sampling_params.extra_args, settings.server)
    prompt_len = len(prompt_token_ids)
    room = max(1, settings.max_model_len - prompt_len)
    wanted = sampling_params.max_tokens
    canvas_len = min(room, settings.server.default_canvas if wanted is None else wanted)
    prompt_masks = sum(1 for token in prompt_token_ids if token == settings.mask_token_id)
    paced = parameters.pace is not None
    steps = parameters.steps
    if steps is None and paced:
        # No cap but the masks of each block, those of the prompt too.
        steps = canvas_len * (canvas_len + prompt_masks)
    blocks = plan_blocks(canvas_len, parameters.block_length, steps, prompt_masks)
    num_steps = sum(block.steps for block in blocks)

    guided = parameters.cfg_scale > 0
    seq_len = prompt_len + canvas_len
    step_tokens = 2 * seq_len if guided and 2 * seq_len <= settings.max_batch_tokens else seq_len

    # With a pace the first step is dense and another one builds, at least.
    step = 1 if paced else pattern_step(num_steps, parameters.sparsed_skip)
    block_size, select = parameters.pattern_settings(seq_len)
    rows = -(-seq_len // block_size) * (2 if guided else 1)
    sparse_steps = num_steps - 1 - step
    times = None
    if settings.store is None or not parameters.sparsed_enabled:
        sparse, attention = False, "dense, as asked"
    elif sparse_steps < 1:
        sparse, attention = (
            False,
            f"dense, as its first {step + 1} steps of {num_steps}",
        )
    elif rows > settings.store.num_rows:
        sparse, attention = False, f"dense, as its {rows} pattern rows do not fit the store"
    elif (width := _pattern_width(seq_len, canvas_len, block_size, select)) > settings.store.width:
        sparse, attention = (
            False,
            f"dense, as pattern rows of {width} blocks do not fit the store's of "
            f"{settings.store.width}",
        )
    else:
        if settings.crossover is not None and parameters.sparsed_dense_if_faster:
            times = settings.crossover.predict(seq_len, canvas_len, block_size, select)
        sparse, attention = _choose(times, sparse_steps)
        if sparse and paced:
            attention = f"densely until {parameters.sparsed_skip:.3g} of its canvas is decided"
    return RequestPlan(
        prompt_len=prompt_len,
        canvas_len=canvas_len,
        parameters=parameters,
        blocks=blocks,
        num_steps=num_steps,
        block_size=block_size,
        select=select,
        pattern_step=step if sparse and not paced else -1,
        prediction=times if paced else None,
        guided=guided,
        step_tokens=step_tokens,
        num_pattern_rows=rows if sparse else 0,
        attention=attention,
    )


def _pattern_width(seq_len: int, canvas_len: int, block_size: int, select: float) -> int:
    """Most key blocks that a row of a request's patterns keeps."""
    blocks = -(-seq_len // block_size)
    generation = blocks - generation_start_block(seq_len, canvas_len, block_size)
    return kept_blocks_bound(blocks, generation, select)


def _choose(times: Prediction | None, sparse_steps: int) -> tuple[bool, str]:
    """Whether to attend sparsely in the last `sparse_steps` steps, and the reason."""
    if times is None:
        return True, f"sparse in {sparse_steps} steps, as asked"
    sparse = times.sparse_pays(sparse_steps)
    return sparse, (
        f"{'sparse' if sparse else 'dense'}, as predicted to be faster: {sparse_steps} steps of "
        f"{times.dense * 1e3:.3f} ms a layer dense, or of {times.sparse * 1e3:.3f} ms sparse and "
        f"{times.build * 1e3:.3f} ms for the pattern"
    )
