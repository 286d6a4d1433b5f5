"""Sampling defaults of a diffusion model: temperature 0 and the default canvas."""

from typing import TYPE_CHECKING, Any, Final

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_sparsed.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_sparsed.config.parameters import ServerSettings

logger = init_logger(__name__)

INAPPLICABLE_DEFAULTS: Final = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_p": 0.0,
}
"""Defaults that vLLM takes from a generation configuration and that a request may not ask for, with
the value that leaves each off."""


class GenerationDefaults(dict[str, Any]):
    """Sampling defaults where `max_new_tokens` is a default, not a cap.

    vLLM merges `override_generation_config` into the defaults of a request, and also asks it for
    `max_new_tokens` to cap larger explicit values. The default canvas must not cap anything, so
    `get` does not show it; merging does.
    """

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "max_new_tokens" else super().get(key, default)


def set_generation_defaults(model_config: "ModelConfig", server: "ServerSettings") -> int:
    """Default temperature 0 and the default canvas, where nothing else names any.

    As in vLLM, `max_new_tokens` of `--override-generation-config` or of a `--generation-config`
    folder is also the most that a request may ask for; the checkpoint's own is a default alone.

    Defaults of the checkpoint, or of such a folder, that diffusion decoding cannot apply are left
    out with a warning; those of the override were asked for, so they are refused.

    Returns:
        The canvas of a request that asks for no number of tokens.

    Raises:
        ValueError: a default of the override that cannot apply, one that no request could use,
            `max_new_tokens` that is no positive integer or is a cap above `sparsed.max_canvas`.
    """
    source = model_config.generation_config
    stated = {} if source == "vllm" else model_config.try_get_generation_config()
    given = model_config.override_generation_config
    merged = {**stated, **given}
    defaults: dict[str, Any] = {} if "temperature" in merged else {"temperature": 0.0}
    in_folder = source not in ("auto", "vllm")
    for option, off in INAPPLICABLE_DEFAULTS.items():
        if given.get(option, off) not in (None, off):
            raise ValueError(
                f"{option} of --override-generation-config is {given[option]!r}, but diffusion "
                f"decoding does not support {option}: leave it out."
            )
    left_out = {
        option: stated[option]
        for option, off in INAPPLICABLE_DEFAULTS.items()
        if stated.get(option, off) not in (None, off)
    }
    if left_out:
        logger.warning(
            "Defaults left out, as diffusion decoding does not support them: %s (%s)",
            ", ".join(f"{option}={value!r}" for option, value in left_out.items()),
            source if in_folder else "the checkpoint's generation_config.json",
        )
        defaults |= dict.fromkeys(left_out)
    canvas = merged.get("max_new_tokens")
    if canvas is None:
        name, canvas, is_cap = "diffusion.default_canvas", server.default_canvas, False
    else:
        origin = "--generation-config" if in_folder else "the checkpoint's generation_config.json"
        if "max_new_tokens" in given:
            origin = "--override-generation-config"
        name, is_cap = f"max_new_tokens of {origin}", in_folder or "max_new_tokens" in given
        if type(canvas) is not int or canvas < 1:
            raise ValueError(f"{name} is {canvas!r}, but must be an integer of at least 1.")

    limit = server.sparsed_max_canvas if server.defaults.sparsed_enabled else None
    if limit is not None and canvas > limit:
        if is_cap:
            raise ValueError(
                f"{name} is {canvas}, but must be at most sparsed.max_canvas={limit}: lower the "
                "one or raise the other."
            )
        logger.warning("%s lowered from %d to sparsed.max_canvas=%d", name, canvas, limit)
        canvas = limit

    if is_cap:
        model_config.override_generation_config = {**defaults, **given}
        _check_defaults(model_config)
        return canvas
    if in_folder:
        # vLLM caps requests at the defaults of such a folder, but not at those of the model's own
        # configuration, which has been read already.
        model_config.hf_config_path, model_config.generation_config = source, "auto"
    model_config.override_generation_config = GenerationDefaults(
        {**defaults, **given, "max_new_tokens": canvas}
    )
    _check_defaults(model_config)
    return canvas


def _check_defaults(model_config: "ModelConfig") -> None:
    defaults = model_config.get_diff_sampling_param()
    try:
        SamplingParams.from_optional(**defaults)
    except (VLLMValidationError, ValueError) as error:
        # Otherwise every request that does not give this option would be refused.
        raise ValueError(
            f"The sampling defaults {defaults} are not valid: {error} Give others in "
            "--override-generation-config, or use --generation-config vllm."
        ) from error
