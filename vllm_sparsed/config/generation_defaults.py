"""Sampling defaults of a diffusion model: temperature 0 and the default canvas."""

from typing import TYPE_CHECKING, Any

from vllm_sparsed.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_sparsed.config.parameters import ServerSettings

logger = init_logger(__name__)


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

    Returns:
        The canvas of a request that asks for no number of tokens.

    Raises:
        ValueError: `max_new_tokens` is no positive integer, or a cap above `sparsed.max_canvas`.
    """
    source = model_config.generation_config
    stated = {} if source == "vllm" else model_config.try_get_generation_config()
    given = model_config.override_generation_config
    merged = {**stated, **given}
    defaults = {} if "temperature" in merged else {"temperature": 0.0}
    in_folder = source not in ("auto", "vllm")
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
        return canvas
    if in_folder:
        # vLLM caps requests at the defaults of such a folder, but not at those of the model's own
        # configuration, which has been read already.
        model_config.hf_config_path, model_config.generation_config = source, "auto"
    model_config.override_generation_config = GenerationDefaults(
        {**defaults, **given, "max_new_tokens": canvas}
    )
    return canvas
