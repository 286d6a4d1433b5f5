"""Parameters of a request and of the server, validated.

A request gives its own in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`) under the prefixed
name, `diffusion_steps`; the server gives defaults in
`--additional-config '{"diffusion": {"steps": 64}, "sparsed": {"select": 0.5}}'`.
`parameter_table.PARAMETERS` defines each. This module imports neither PyTorch nor vLLM: front-end
processes use it alone.
"""

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vllm_sparsed.config.parameter_table import (
    BLOCK_LENGTH,
    LLADA_ALGORITHMS,
    LONG_BLOCK_SIZE,
    LONG_SELECT,
    PACES,
    PARAMETERS,
    SEVERAL_BLOCKS_PACES,
    SHORT_BLOCK_SIZE,
    SHORT_CONTEXT,
    SHORT_SELECT,
    SHOWN_CHARACTERS,
    ParameterError,
    parameter_table,
    shown,
)
from vllm_sparsed.planning.reuse import Mode

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
WINDOW_PARAMETERS: Final = ("warmup_passes", "refresh_tokens", "refresh_passes", "window_margin")
"""Parameters that say when `kv_reuse` window refreshes and how far it reaches."""

_BY_SERVER_KEY: Final = {p.server_key: p for p in PARAMETERS}


@dataclass(frozen=True, slots=True)
class RequestParameters:
    """Validated parameters of one request; the fields are those of `PARAMETERS`.

    `steps` None: as many as canvas tokens; `block_length` None: the whole canvas is one block.
    In a server's defaults `block_length` None means that the algorithm decides. At most one of the
    paces (`PACES`) is given; all None: a fixed schedule. `block_add` None: one block at a time.
    `refresh_tokens` None: the block length; `refresh_passes` None: no limit. `top_p` and `top_k`
    None: as in vLLM's `SamplingParams`, which drops its own at temperature 0. `sparsed_select` and
    `sparsed_block_size` None: by the length of the request, see `pattern_settings`.
    """

    steps: int | None
    threshold: float | None
    factor: float | None
    entropy_bound: float | None
    entropy_threshold: float | None
    block_add: float | None
    block_full: float | None
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
    kv_reuse: Mode
    warmup_passes: int
    refresh_tokens: int | None
    refresh_passes: int | None
    window_margin: int
    show_canvas: bool
    sparsed_enabled: bool
    sparsed_dense_if_faster: bool
    sparsed_skip: float
    sparsed_select: float | None
    sparsed_block_size: int | None

    @property
    def pace(self) -> tuple[str, float] | None:
        """Name (of `PACES`) and value of what decides in place of a schedule."""
        for name in PACES:
            value: float | None = getattr(self, name)
            if value is not None:
                return name, value
        return None

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
        kv_reuse_pages: whether memory for keys and values is allocated; None: the engine decides.
    """

    defaults: RequestParameters
    default_canvas: int
    kv_reuse_pages: bool | None
    sparsed_max_canvas: int | None
    sparsed_flash_attention_4: bool

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
        ParameterError: an unknown name or bad value in one of the two sections, or two values that
            do not go together.
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
    if values["kv_reuse"] != "none" and values["kv_reuse_pages"] is False:
        raise ParameterError(
            f"diffusion.kv_reuse is {values['kv_reuse']}, which needs diffusion.kv_reuse_pages, "
            "but that is false: leave one of the two out."
        )
    settings = ServerSettings(
        default_canvas=values.pop("default_canvas"),
        kv_reuse_pages=values.pop("kv_reuse_pages"),
        sparsed_max_canvas=values.pop("sparsed_max_canvas"),
        sparsed_flash_attention_4=values.pop("sparsed_flash_attention_4"),
        defaults=RequestParameters(**values),
    )
    _check_pace(values, lambda name: f"diffusion.{name}")
    return settings


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
        ParameterError: an unknown name, a bad value, two values that do not go together, or what
            the server does not allow.
    """
    given: dict[str, Any] = {}
    for key, value in (extra_args or {}).items():
        parameter = _BY_REQUEST_KEY.get(key)
        if parameter is not None:
            parsed = parameter.parse(value, key)
            if parsed is not None:
                given[parameter.field] = parsed
        elif key not in _FOREIGN_KEYS:
            raise _unknown(key, tuple(_BY_REQUEST_KEY))
    values: dict[str, Any] = asdict(settings.defaults)
    # The server's is a permission: who reads a canvas reads an answer, so each request asks.
    values["show_canvas"] = False
    if not PACES.keys().isdisjoint(given):
        # A pace of its own takes the place of the server's; so do its blocks, which go with one.
        values |= dict.fromkeys((*PACES, "block_add", "block_full"))
    values |= given
    _check_pace(
        values, lambda name: f"{'' if name in given else 'the server default '}diffusion_{name}"
    )
    parameters = _with_block_length(values)
    _check_reuse(parameters, given, settings)
    if parameters.sparsed_enabled and not settings.defaults.sparsed_enabled:
        raise ParameterError(
            "sparsed_enabled is true, but this server attends densely: start it with "
            "--attention-backend sparsed and without sparsed.enabled=false."
        )
    if parameters.show_canvas and not settings.defaults.show_canvas:
        raise ParameterError(
            "diffusion_show_canvas is true, but this server shows no canvases: start it with "
            """--additional-config '{"diffusion": {"show_canvas": true}}'."""
        )
    return parameters


def _check_reuse(
    parameters: RequestParameters, given: Collection[str], settings: ServerSettings
) -> None:
    """Refuse a mode that the server has no memory for, and parameters that the mode ignores."""
    mode = parameters.kv_reuse
    if mode != "none" and settings.kv_reuse_pages is False:
        raise ParameterError(
            f"diffusion_kv_reuse is {mode}, but this server keeps no keys and values: start it "
            "with --attention-backend sparsed and diffusion.kv_reuse_pages=true."
        )
    if mode != "window":
        for name in WINDOW_PARAMETERS:
            if name in given:
                raise ParameterError(
                    f"diffusion_{name} has no effect with diffusion_kv_reuse {mode}: leave it out "
                    "or ask for diffusion_kv_reuse window."
                )


def _check_pace(values: Mapping[str, Any], named: Callable[[str], str]) -> None:
    """Refuse what does not go with a pace.

    Args:
        values: by field.
        named: how the message names a field.
    """
    paces = [name for name in PACES if values[name] is not None]
    if len(paces) > 1:
        raise ParameterError(
            f"{named(paces[0])} and {named(paces[1])} do not go together: give one pace at most."
        )
    pace = paces[0] if paces else None
    if pace is not None and values["alg"] is not None and values["alg"] not in PACES[pace]:
        raise ParameterError(
            f"{named(pace)} does not go with {named('alg')} {values['alg']}, but with "
            f"{', '.join(PACES[pace])}."
        )
    if pace is not None and values["alg_temp"] > 0:
        raise ParameterError(
            f"{named(pace)} does not go with {named('alg_temp')} {values['alg_temp']:g}, which "
            "draws the order: it must be 0."
        )
    if values["block_full"] is not None and values["block_add"] is None:
        raise ParameterError(f"{named('block_full')} has no effect without diffusion_block_add.")
    if values["block_add"] is not None and pace not in SEVERAL_BLOCKS_PACES:
        other = "without a pace" if pace is None else f"with {named(pace)}"
        raise ParameterError(
            f"{named('block_add')} does not go {other}, but with "
            f"{' or '.join(f'diffusion_{name}' for name in SEVERAL_BLOCKS_PACES)}."
        )


def _with_block_length(values: dict[str, Any]) -> RequestParameters:
    parameters = RequestParameters(**values)
    if parameters.block_length is None and (
        parameters.alg in LLADA_ALGORITHMS or parameters.pace is not None
    ):
        return replace(parameters, block_length=BLOCK_LENGTH)
    return parameters


def _unknown(key: object, known: tuple[str, ...]) -> ParameterError:
    nearest = difflib.get_close_matches(str(key)[:SHOWN_CHARACTERS], known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    return ParameterError(
        f"{shown(key)} is not a parameter.{hint} Allowed here: {', '.join(known)}."
    )
