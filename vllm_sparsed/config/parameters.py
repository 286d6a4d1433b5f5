"""Parameters of a request and of the server, validated.

A request gives its own in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`) under the prefixed
name, `diffusion_steps`; the server gives defaults in
`--additional-config '{"diffusion": {"steps": 64}, "sparsed": {"select": 0.5}}'`.
`parameter_table.PARAMETERS` defines each. This module imports neither PyTorch nor vLLM: front-end
processes use it alone.
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from vllm_sparsed.config.parameter_table import (
    BLOCK_SIZES,
    LLADA_ALGORITHMS,
    LLADA_BLOCK_LENGTH,
    LONG_BLOCK_SIZE,
    LONG_SELECT,
    PARAMETERS,
    SHORT_BLOCK_SIZE,
    SHORT_CONTEXT,
    SHORT_SELECT,
    SHOWN_CHARACTERS,
    ParameterError,
    parameter_table,
    shown,
)

__all__ = [
    "ParameterError",
    "RequestParameters",
    "ServerSettings",
    "parameter_table",
    "parse_server_settings",
    "request_parameters",
]

# Keys of extra_args that other parts of vLLM put there and that change nothing here.
_FOREIGN_KEYS: Final = frozenset({"session_id"})
_BY_REQUEST_KEY: Final = {p.request_key: p for p in PARAMETERS if p.per_request}
_BY_SERVER_KEY: Final = {p.server_key: p for p in PARAMETERS}


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """Validated parameters of one request; the fields are those of `PARAMETERS`.

    `steps` None: as many as canvas tokens; `block_length` None: the whole canvas is one block.
    In a server's defaults `block_length` None means that the algorithm decides. `top_p` and `top_k`
    None: as in vLLM's `SamplingParams`, which drops its own at temperature 0. `sparsed_select`
    and `sparsed_block_size` None: by the length of the request, see `pattern_settings`.
    """

    steps: int | None
    block_length: int | None
    alg: str
    alg_temp: float
    eps: float
    cfg_scale: float
    top_p: float | None
    top_k: int | None
    infill: bool
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    sparsed_enabled: bool
    sparsed_dense_if_faster: bool
    sparsed_skip: float
    sparsed_select: float | None
    sparsed_block_size: int | None

    def pattern_settings(self, seq_len: int) -> tuple[int, float]:
        """Block size and select of a request of so many tokens, prompt and canvas.

        What nobody gave is as released with SparseD, for short or for long contexts.
        """
        is_short = seq_len <= SHORT_CONTEXT
        block_size = SHORT_BLOCK_SIZE if is_short else LONG_BLOCK_SIZE
        select = SHORT_SELECT if is_short else LONG_SELECT
        return (
            block_size if self.sparsed_block_size is None else self.sparsed_block_size,
            select if self.sparsed_select is None else self.sparsed_select,
        )


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """The server's defaults for requests, and what it alone decides.

    Attributes:
        defaults: parameters of a request that gives none.
        default_canvas: canvas length in tokens where neither request nor checkpoint says.
        sparsed_max_canvas: longest canvas the pattern store is sized for; None: up to the context.
        sparsed_flash_attention_4: whether FlashAttention 4 may attend for sparse requests.
    """

    defaults: RequestParameters
    default_canvas: int
    sparsed_max_canvas: int | None
    sparsed_flash_attention_4: bool

    def block_sizes(self, max_model_len: int) -> list[int]:
        """All that requests of up to so many tokens can have, asked for or not; ascending."""
        return list(BLOCK_SIZES)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ServerSettings":
        """Read what `to_json` wrote; it was validated before."""
        fields = json.loads(text)
        return cls(**{**fields, "defaults": RequestParameters(**fields["defaults"])})


def parse_server_settings(
    additional_config: Mapping[str, object], model_alg: str
) -> ServerSettings:
    """Read the server's settings from vLLM's `additional_config`.

    Args:
        additional_config: its sections "diffusion" and "sparsed" are read, others are not ours.
        model_alg: the algorithm where the configuration names none.

    Raises:
        ParameterError: an unknown name or bad value in one of the two sections.
    """
    given: dict[str, object] = {}
    for group in ("diffusion", "sparsed"):
        section = additional_config.get(group, {})
        if not isinstance(section, Mapping):
            raise ParameterError(f"{group} is {shown(section)}, but must be a JSON object.")
        given |= {f"{group}.{name}": value for name, value in section.items()}
    values: dict[str, Any] = {p.field: p.default for p in PARAMETERS}
    values["alg"] = model_alg
    for key, value in given.items():
        parameter = _BY_SERVER_KEY.get(key)
        if parameter is None:
            raise _unknown(key, tuple(_BY_SERVER_KEY))
        parsed = parameter.parse(value, key)
        if parsed is not None:
            values[parameter.field] = parsed
    return ServerSettings(
        default_canvas=values.pop("default_canvas"),
        sparsed_max_canvas=values.pop("sparsed_max_canvas"),
        sparsed_flash_attention_4=values.pop("sparsed_flash_attention_4"),
        defaults=RequestParameters(**values),
    )


def request_parameters(
    extra_args: Mapping[str, object] | None, settings: ServerSettings
) -> RequestParameters:
    """Validate a request's parameters and fill in the server's defaults.

    Args:
        extra_args: `SamplingParams.extra_args`. A parameter given as None counts as not given.
        settings: the server's. The pattern store was sized for its `sparsed_select` and
            `sparsed_block_size`; how much more a request may have depends on its length, so that
            is seen when it is planned.

    Raises:
        ParameterError: an unknown name, a bad value, or sparse attention of a dense server.
    """
    values: dict[str, Any] = asdict(settings.defaults)
    for key, value in (extra_args or {}).items():
        parameter = _BY_REQUEST_KEY.get(key)
        if parameter is not None:
            parsed = parameter.parse(value, key)
            if parsed is not None:
                values[parameter.field] = parsed
        elif key not in _FOREIGN_KEYS:
            raise _unknown(key, tuple(_BY_REQUEST_KEY))
    parameters = _with_block_length(values)
    if parameters.sparsed_enabled and not settings.defaults.sparsed_enabled:
        raise ParameterError(
            "sparsed_enabled is true, but this server attends densely: start it with "
            "--attention-backend sparsed and without sparsed.enabled=false."
        )
    return parameters


def _with_block_length(values: dict[str, Any]) -> RequestParameters:
    if values["block_length"] is None and values["alg"] in LLADA_ALGORITHMS:
        values["block_length"] = LLADA_BLOCK_LENGTH
    return RequestParameters(**values)


def _unknown(key: object, known: tuple[str, ...]) -> ParameterError:
    nearest = difflib.get_close_matches(str(key)[:SHOWN_CHARACTERS], known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return ParameterError(
        f"{shown(key)} is not a parameter.{hint} Allowed here: {', '.join(known)}."
    )
