"""What rotary scalings a configuration may ask for; PyTorch is not imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class _Scaling:
    """Keys of one type, all of them numbers above 0 (`truncate` is a boolean)."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_ORIGINAL: Final = "original_max_position_embeddings"

SCALINGS: Final[Mapping[str, _Scaling]] = {
    "default": _Scaling(),
    "linear": _Scaling(("factor",)),
    "dynamic": _Scaling(("factor",)),
    "ntk": _Scaling(("factor",)),
    "yarn": _Scaling(
        ("factor", _ORIGINAL),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": _Scaling(("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor")),
}
"""By type: those whose angles depend on the position alone."""


def complete_parameters(
    parameters: Mapping[str, Any] | None, default_theta: float
) -> dict[str, Any]:
    """`rope_parameters` (or the older `rope_scaling`) of a configuration, with type and theta.

    Args:
        parameters: as config.json or `--hf-overrides` say; None: no scaling.
        default_theta: where they have no rope_theta.

    Raises:
        ValueError: names the type or the key, and what is allowed.
    """
    given = dict(parameters or {})
    legacy = given.pop("type", None)
    kind = given.pop("rope_type", legacy or "default")
    scaling = SCALINGS.get(kind) if isinstance(kind, str) else None
    if scaling is None:
        raise ValueError(
            f"rope_type={kind!r} is not supported; it must be one of {', '.join(SCALINGS)}."
        )
    # What asks for nothing.
    for key, nothing in (("partial_rotary_factor", 1.0), ("factor", 1.0), (_ORIGINAL, None)):
        if key not in scaling.required and given.get(key) in (None, nothing):
            given.pop(key, None)
    allowed = ("rope_theta", *scaling.required, *scaling.optional)
    theta = given.get("rope_theta")
    given = {key: value for key, value in given.items() if value is not None}
    given["rope_theta"] = default_theta if theta is None else theta
    for key in scaling.required:
        if key not in given:
            raise ValueError(f"rope_parameters of rope_type={kind!r} need {key}.")
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(
                f"rope_parameters of rope_type={kind!r} may not have {key}={value!r}, but "
                f"{', '.join(allowed)}."
            )
        if key == "truncate":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{key}={value!r} of rope_parameters must be a number above 0.")
        if key == _ORIGINAL and value != int(value):
            raise ValueError(f"{key}={value!r} of rope_parameters must be an integer.")
        if key == "factor" and value < 1:
            raise ValueError(f"{key}={value!r} of rope_parameters must be at least 1.")
    if "factor" in given:
        # vLLM takes an integer for a list.
        given["factor"] = float(given["factor"])
    if kind == "llama3" and given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError("low_freq_factor of rope_parameters must be below high_freq_factor.")
    return {"rope_type": kind, **given}


def scaled_length(parameters: Mapping[str, Any]) -> int:
    """Positions that the scaling is made for, where it says so itself; else 0."""
    if _ORIGINAL not in parameters:
        return 0
    return int(parameters[_ORIGINAL] * parameters["factor"])
