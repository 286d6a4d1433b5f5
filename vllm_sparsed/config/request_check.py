"""Checks of a request in the front end, where an error becomes an HTTP 400.

vLLM's seam for request checks is the class method `validate_params` of a logits processor named in
the model's configuration. The class sees no engine configuration, so the server's settings travel
in its name: the module makes `RequestCheck_<hex of JSON>` on demand, in whatever process asks.
"""

import json
from functools import cache
from typing import Any, ClassVar, Final, NoReturn

import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as LogitsProcessorV2,
)

from vllm_sparsed.config.parameter_table import shown
from vllm_sparsed.config.parameters import (
    ParameterError,
    RequestParameters,
    ServerSettings,
    request_parameters,
)
from vllm_sparsed.frontend.admission import INFILL, tell_admitted, tell_refused
from vllm_sparsed.scheduling.metrics import export_step_counters

_PREFIX: Final = "RequestCheck_"

# Sampling options that presuppose left-to-right decoding or scores that a denoising step does not
# have, with the value that leaves each off.
_UNSUPPORTED: Final[dict[str, Any]] = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "prompt_logprob_token_ids": None,
    "logprob_token_ids": None,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "bad_words": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "trace_decode_token_ids": None,
}

# What else a client may have asked for that arrives as one of these options.
_ALSO_KNOWN_AS: Final = {
    "logprobs": " (nor is beam search, which needs them)",
    "structured_outputs": " (nor is a response_format or tool choice that needs it)",
}

# Integers of any size as far as vLLM's own checks go; beyond 64 bits they would fail in the engine.
_COUNTS: Final = ("top_k", "stream_interval")
_MAX_COUNT: Final = 2**31 - 1


class _RequestCheck(LogitsProcessorV1, LogitsProcessorV2):
    """Carrier of `validate_params`; never instantiated, because the runner samples by itself."""

    settings: ClassVar[ServerSettings]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what cannot work here.

        Raises:
            VLLMValidationError: names the parameter and what is allowed.
        """
        try:
            INFILL.set(cls._check(sampling_params).infill)
        except VLLMValidationError as error:
            tell_refused(error)
            raise
        tell_admitted()

    @classmethod
    def _check(cls, sampling_params: SamplingParams) -> RequestParameters:
        for name, off in _UNSUPPORTED.items():
            value = getattr(sampling_params, name, off)
            if _is_asked(value, off):
                hint = _ALSO_KNOWN_AS.get(name, "")
                _refuse(name, value, f"{name} is not supported by diffusion decoding{hint}")
        try:
            parameters = request_parameters(sampling_params.extra_args, cls.settings)
        except ParameterError as error:
            raise VLLMValidationError(str(error)) from error
        if sampling_params.max_tokens is None:
            # vLLM would take the whole context that remains; a canvas has a default of its own.
            # Offline it is the caller's object: vLLM copies it only after the last hook.
            sampling_params.max_tokens = cls.settings.default_canvas
        limit = cls.settings.sparsed_max_canvas
        if parameters.sparsed_enabled and limit and sampling_params.max_tokens > limit:
            _refuse(
                "max_tokens",
                sampling_params.max_tokens,
                f"max_tokens must be at most {limit}, the server's sparsed.max_canvas "
                "(or set sparsed_enabled to 0)",
            )
        for name in _COUNTS:
            count = getattr(sampling_params, name) or 0
            if count > _MAX_COUNT:
                _refuse(name, count, f"{name} must be at most {_MAX_COUNT}")
        seed = sampling_params.seed
        # The engine checks each of n choices again, and their seeds may go past the end of int64.
        if seed is not None and not -(2**63) <= seed < 2**63 + _MAX_COUNT:
            _refuse("seed", seed, "seed must fit 64 bits")
        if parameters.infill and sampling_params.stop:
            _refuse(
                "stop",
                sampling_params.stop,
                "stop does not go with diffusion_infill: the answer repeats the prompt, where the "
                "stop strings would be looked for too",
            )
        return parameters

    def __init__(self, *args: object) -> None:
        raise TypeError("checks requests only; the model runner samples by itself")

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: object) -> None:
        """Nothing to keep: never instantiated."""

    def apply(self, logits: torch.Tensor, *args: object) -> torch.Tensor:
        return logits


def _is_asked(value: Any, off: Any) -> bool:
    if value is None or off is not None:
        return value is not None and value != off
    return not hasattr(value, "__len__") or len(value) > 0


def _refuse(name: str, value: object, message: str) -> NoReturn:
    raise VLLMValidationError(message, parameter=name, value=shown(value))


def request_check_name(settings: ServerSettings, counters_path: str) -> str:
    """The name under which vLLM finds the check for these settings (`module:Class`)."""
    payload = json.dumps({"settings": settings.to_json(), "counters": counters_path})
    return f"{__name__}:{_PREFIX}{payload.encode().hex()}"


@cache
def _make_check(name: str) -> type[_RequestCheck]:
    payload = json.loads(bytes.fromhex(name.removeprefix(_PREFIX)))
    export_step_counters(payload["counters"])
    settings = ServerSettings.from_json(payload["settings"])
    return type(name, (_RequestCheck,), {"settings": settings})


def __getattr__(name: str) -> type[_RequestCheck]:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _make_check(name)
