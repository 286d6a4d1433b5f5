"""One typed definition of each parameter: checks, messages and the README's table come from it.

Neither PyTorch nor vLLM is imported here.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from vllm_sparsed.kernels.dimensions import BLOCK_SIZES
from vllm_sparsed.planning.reuse import MODES

LLADA_ALGORITHMS: Final = ("low_confidence", "random")
DREAM_ALGORITHMS: Final = ("origin", "maskgit_plus", "topk_margin", "entropy")
# Tokens of a semi-autoregressive block where neither request nor server says; with a schedule the
# Dream algorithms take the whole canvas as one block.
BLOCK_LENGTH: Final = 32

PACES: Final[Mapping[str, tuple[str, ...]]] = {
    "threshold": ("low_confidence", "maskgit_plus", "topk_margin"),
    "factor": ("low_confidence", "maskgit_plus", "topk_margin"),
    "entropy_bound": ("low_confidence", "maskgit_plus", "topk_margin", "entropy"),
    "entropy_threshold": ("low_confidence", "maskgit_plus", "topk_margin", "entropy"),
}
"""The parameters that decide by what the model is sure of in place of a schedule, at most one of
them in a request, and the algorithms that each goes with: the others' order is random."""

SEVERAL_BLOCKS_PACES: Final = ("threshold", "entropy_threshold")
"""Paces that decide in several blocks at once: those that judge each candidate by itself."""

BLOCK_FULL: Final = 0.95
"""`block_full` where nobody gives it, as in d3LLM."""


SHORT_CONTEXT: Final = 2048
"""Tokens of the longest request, prompt and canvas, with SparseD's settings for short contexts. It
names no boundary; its tests of long contexts begin at 4,096."""
SHORT_SELECT: Final = 0.5
SHORT_BLOCK_SIZE: Final = 32
LONG_SELECT: Final = 0.3
LONG_BLOCK_SIZE: Final = 128
SELECT_BY_LENGTH: Final = f"{LONG_SELECT:g}; {SHORT_SELECT:g} up to {SHORT_CONTEXT:,} tokens"
BLOCK_SIZE_BY_LENGTH: Final = (
    f"{LONG_BLOCK_SIZE}; {SHORT_BLOCK_SIZE} up to {SHORT_CONTEXT:,} tokens"
)

# Characters of a refused value that a message repeats.
SHOWN_CHARACTERS: Final = 80
# Counts and lengths fit 32 bits: larger ones would not survive the way to the engine.
_MAX_INTEGER: Final = 2**31 - 1

Kind = Literal["integer", "number", "boolean", "name"]


class ParameterError(ValueError):
    """A parameter is unknown or its value is not allowed; the message names it and what is."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """Definition of one parameter.

    Attributes:
        group: "diffusion" or "sparsed": prefix in a request, section in the server's configuration.
        name: name without the prefix.
        kind: type of the value.
        default: value where nobody says; None: see `default_text`.
        default_text: how the table shows the default, where the value alone does not say it.
        minimum, maximum: bounds of a number, both allowed unless said to be open.
        open_minimum, open_maximum: whether the bound itself is refused.
        choices: the only values allowed.
        per_request: whether a request may give it, not the server alone.
        meaning: one sentence.
    """

    group: Literal["diffusion", "sparsed"]
    name: str
    kind: Kind
    default: bool | int | float | str | None
    meaning: str
    default_text: str = ""
    minimum: int | None = None
    maximum: int | None = None
    open_minimum: bool = False
    open_maximum: bool = False
    choices: tuple[int | str, ...] = ()
    per_request: bool = True

    @property
    def request_key(self) -> str:
        return f"{self.group}_{self.name}"

    @property
    def server_key(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def field(self) -> str:
        """Attribute of `RequestParameters` (or `ServerSettings`) that holds the value."""
        return self.request_key if self.group == "sparsed" else self.name

    @property
    def allowed(self) -> str:
        """The values allowed, in words."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.kind == "boolean":
            return "a boolean: true, false, 1 or 0"
        noun = "an integer" if self.kind == "integer" else "a number"
        if self.maximum is None:
            return f"{noun} {'>' if self.open_minimum else '>='} {self.minimum}"
        left, right = "(" if self.open_minimum else "[", ")" if self.open_maximum else "]"
        return f"{noun} in {left}{self.minimum}, {self.maximum}{right}"

    def parse(self, value: object, key: str) -> Any:
        """Return `value` in the parameter's type.

        Args:
            value: as it came from JSON or from Python.
            key: how the caller names the parameter, for the message.

        Raises:
            ParameterError: not a value of this parameter.
        """
        if value is None and self.default is None:
            return None
        try:
            parsed = _PARSERS[self.kind](value)
        except (KeyError, OverflowError, TypeError, ValueError):
            raise self._refusal(value, key) from None
        if self.choices:
            if parsed not in self.choices:
                raise self._refusal(value, key)
        elif self.kind in ("integer", "number") and not self._in_range(parsed):
            raise self._refusal(value, key)
        return parsed

    def _in_range(self, value: float) -> bool:
        below = self.minimum is not None and (
            value < self.minimum or (self.open_minimum and value == self.minimum)
        )
        above = self.maximum is not None and (
            value > self.maximum or (self.open_maximum and value == self.maximum)
        )
        return not (below or above)

    def _refusal(self, value: object, key: str) -> ParameterError:
        return ParameterError(f"{key} is {shown(value)}, but must be {self.allowed}.")


def shown(value: object) -> str:
    """`value` for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond Python's limit of digits
        text = "a number of too many digits"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _integer(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _boolean(value: object) -> bool:
    # vLLM's HTTP schema has no boolean in vllm_xargs: true arrives as 1 or 1.0.
    if isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise TypeError


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


_PARSERS: Final[Mapping[Kind, Callable[[object], Any]]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "name": _name,
}

PARAMETERS: Final[tuple[Parameter, ...]] = (
    Parameter(
        "diffusion",
        "steps",
        "integer",
        None,
        "Denoising steps of the whole request, spread evenly over its blocks; a block never takes "
        "more steps than it has masks nor fewer than one. With a pace (the four parameters below) "
        "the most that it may take: the last one decides all that is left.",
        default_text="as many as canvas tokens",
        minimum=1,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "threshold",
        "number",
        None,
        "Pace: a step decides every candidate whose confidence (the probability of its token; with "
        "topk_margin the margin) is at least this, and the best one always.",
        default_text="off",
        minimum=0,
        maximum=1,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "factor",
        "number",
        None,
        "Pace: of the candidates by falling probability c, a step decides the first, and then as "
        "long as the n-th has c >= 1 - factor / (n + 1).",
        default_text="off",
        minimum=0,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "entropy_bound",
        "number",
        None,
        "Pace: of the candidates by rising entropy, a step decides the first, and then as long as "
        "the entropies before the n-th add up to no more than this (nats).",
        default_text="off",
        minimum=0,
    ),
    Parameter(
        "diffusion",
        "entropy_threshold",
        "number",
        None,
        "Pace: a step decides every candidate whose entropy is below this (nats), and the lowest "
        "always.",
        default_text="off",
        minimum=0,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "block_add",
        "number",
        None,
        f"With {' or '.join(SEVERAL_BLOCKS_PACES)}, for checkpoints distilled for it: the next "
        "block opens when this share of the last open one is decided.",
        default_text="off: one block at a time",
        minimum=0,
        maximum=1,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "block_full",
        "number",
        None,
        "With block_add: a later block has a token decided in every step, sure or not, once this "
        "share of the block before it is.",
        default_text=f"{BLOCK_FULL:g}",
        minimum=0,
        maximum=1,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "block_length",
        "integer",
        None,
        "Tokens of a semi-autoregressive block; the last block may be shorter.",
        default_text=f"{BLOCK_LENGTH} with {' and '.join(LLADA_ALGORITHMS)} and with every pace, "
        "else the whole canvas",
        minimum=1,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "alg",
        "name",
        None,
        "How candidates are ranked and how many are committed in a step.",
        default_text="low_confidence for LLaDA, origin for Dream",
        choices=LLADA_ALGORITHMS + DREAM_ALGORITHMS,
    ),
    Parameter(
        "diffusion",
        "alg_temp",
        "number",
        0.0,
        "Temperature of the order of unmasking: 0 takes the most confident candidates, more draws "
        "them from softmax(confidence / alg_temp).",
        minimum=0,
        maximum=10**6,
    ),
    Parameter(
        "diffusion",
        "eps",
        "number",
        1e-3,
        "Last time of the Dream algorithms' schedule, linspace(1, eps, steps + 1).",
        minimum=0,
        maximum=1,
        open_minimum=True,
        open_maximum=True,
    ),
    Parameter(
        "diffusion",
        "cfg_scale",
        "number",
        0.0,
        "Classifier-free guidance c: logits = u + (c + 1)(l - u), u from a second sequence whose "
        "prompt is masked; above 0 a request costs twice the tokens.",
        minimum=0,
        # Beyond it float32 logits could overflow.
        maximum=10**6,
    ),
    Parameter(
        "diffusion",
        "top_p",
        "number",
        None,
        "In place of top_p, and at temperature 0 too, where vLLM drops top_p; it shapes the "
        "confidence of maskgit_plus, topk_margin and entropy there.",
        default_text="top_p",
        minimum=0,
        maximum=1,
        open_minimum=True,
    ),
    Parameter(
        "diffusion",
        "top_k",
        "integer",
        None,
        "In place of top_k, likewise; 0 keeps all tokens.",
        default_text="top_k",
        minimum=0,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "infill",
        "boolean",
        False,
        "Mask tokens inside the prompt are filled in with the first block, and the answer is the "
        "whole sequence, prompt and canvas; without it such a prompt is refused.",
    ),
    Parameter(
        "diffusion",
        "logits_eos_inf",
        "boolean",
        False,
        "The end-of-sequence logit is -inf before sampling: it is never a candidate.",
    ),
    Parameter(
        "diffusion",
        "confidence_eos_eot_inf",
        "boolean",
        False,
        "Candidates that end the sequence or the turn have confidence -inf: they come last.",
    ),
    Parameter(
        "diffusion",
        "kv_reuse",
        "name",
        "none",
        "Which keys and values are kept between passes: none; those before the block (prefix) or "
        "of all rows (dual) until the next block, as in Fast-dLLM; or those of all rows but a "
        "window round the block, refreshed as the parameters below say (window).",
        choices=MODES,
    ),
    Parameter(
        "diffusion",
        "warmup_passes",
        "integer",
        1,
        "With kv_reuse window: so many first passes compute all rows.",
        minimum=1,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "refresh_tokens",
        "integer",
        None,
        "With kv_reuse window: a pass computes all rows when so many tokens have been decided "
        "since the last that did, each pass counting for at least one; 1: every pass does, as with "
        "none.",
        default_text="the block length",
        minimum=1,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "refresh_passes",
        "integer",
        None,
        "With kv_reuse window: a pass computes all rows when so many have been taken since the "
        "last that did, itself included.",
        default_text="no limit",
        minimum=1,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "window_margin",
        "integer",
        16,
        "With kv_reuse window: rows computed on either side of the block.",
        minimum=0,
        maximum=_MAX_INTEGER,
    ),
    Parameter(
        "diffusion",
        "kv_reuse_pages",
        "boolean",
        None,
        "Allocate memory for keys and values, without which every kv_reuse but none is refused.",
        default_text="true with --attention-backend sparsed, where those of the longest sequence "
        "take less than half of the memory",
        per_request=False,
    ),
    Parameter(
        "diffusion",
        "show_canvas",
        "boolean",
        False,
        "Show the canvas while it is decided, at `/v1/canvases/ID`; a request may ask for it where "
        "the server's value is true, which is no default for requests.",
    ),
    Parameter(
        "diffusion",
        "default_canvas",
        "integer",
        128,
        "Canvas in tokens where neither max_tokens nor the checkpoint says.",
        minimum=1,
        maximum=_MAX_INTEGER,
        per_request=False,
    ),
    Parameter(
        "sparsed",
        "enabled",
        "boolean",
        True,
        "Sparse steps after the dense ones; false keeps every step dense.",
    ),
    Parameter(
        "sparsed",
        "dense_if_faster",
        "boolean",
        True,
        "Keep a request dense where its sparse steps are not predicted to save more time than "
        "building its patterns takes (on CUDA; on CPUs nothing is predicted); false makes every "
        "enabled request sparse.",
    ),
    Parameter(
        "sparsed",
        "skip",
        "number",
        0.2,
        "Share of the steps that use full attention first (SparseD's skip).",
        minimum=0,
        maximum=1,
        open_maximum=True,
    ),
    Parameter(
        "sparsed",
        "select",
        "number",
        None,
        "Share of the key blocks that each query block keeps (SparseD's rho); the server's value "
        "sizes the pattern store, and a request whose patterns are wider stays dense.",
        default_text=SELECT_BY_LENGTH,
        minimum=0,
        maximum=1,
        open_minimum=True,
    ),
    Parameter(
        "sparsed",
        "block_size",
        "integer",
        None,
        "Tokens of a block of the pattern; the server's value sizes the pattern store, and a "
        "request whose patterns are larger stays dense.",
        default_text=BLOCK_SIZE_BY_LENGTH,
        choices=BLOCK_SIZES,
    ),
    Parameter(
        "sparsed",
        "max_canvas",
        "integer",
        None,
        "Longest canvas in tokens that the pattern store is sized for; a longer default canvas is "
        "lowered to it.",
        default_text="the context length",
        minimum=1,
        maximum=_MAX_INTEGER,
        per_request=False,
    ),
    Parameter(
        "sparsed",
        "flash_attention_4",
        "boolean",
        True,
        "Let FlashAttention 4 attend for sparse requests of the lengths at which it was measured "
        "to be faster; false: this package's kernel serves them all.",
        per_request=False,
    ),
)


def parameter_table() -> str:
    """All parameters as a Markdown table, for the README."""
    lines = [
        "| Request | Server | Allowed | Default | Meaning |",
        "|---|---|---|---|---|",
    ]
    for parameter in PARAMETERS:
        request = f"`{parameter.request_key}`" if parameter.per_request else "-"
        default = parameter.default_text or json.dumps(parameter.default)
        lines.append(
            f"| {request} | `{parameter.server_key}` | {parameter.allowed} | {default} "
            f"| {parameter.meaning} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(parameter_table(), end="")
