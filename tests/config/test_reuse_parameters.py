"""Parameters of the keys and values kept between passes: what goes together and what does not."""

import re
from dataclasses import replace

import pytest

from vllm_sparsed.config.parameters import (
    ParameterError,
    parse_server_settings,
    request_parameters,
)

SERVER = parse_server_settings({}, "low_confidence")
WINDOW = ("warmup_passes", "refresh_tokens", "refresh_passes", "window_margin")


@pytest.mark.parametrize("mode", ["none", "prefix", "dual"])
@pytest.mark.parametrize("name", WINDOW)
def test_a_parameter_that_the_mode_ignores_is_refused_with_both_named(name: str, mode: str) -> None:
    both = rf"^diffusion_{name} has no effect with diffusion_kv_reuse {mode}"
    with pytest.raises(ParameterError, match=both):
        request_parameters({f"diffusion_{name}": 4, "diffusion_kv_reuse": mode}, SERVER)
    given = {f"diffusion_{name}": 4, "diffusion_kv_reuse": "window"}
    assert getattr(request_parameters(given, SERVER), name) == 4


def test_a_request_leaves_the_mode_of_the_server_without_its_parameters() -> None:
    diffusion = {"kv_reuse": "window", "refresh_tokens": 128, "window_margin": 8}
    server = parse_server_settings({"diffusion": diffusion}, "low_confidence")
    parameters = request_parameters(None, server)
    assert (parameters.kv_reuse, parameters.refresh_tokens, parameters.window_margin) == (
        "window",
        128,
        8,
    )
    assert request_parameters({"diffusion_kv_reuse": "none"}, server).kv_reuse == "none"
    assert request_parameters({"diffusion_refresh_tokens": 1}, server).refresh_tokens == 1


@pytest.mark.parametrize("mode", ["prefix", "dual", "window"])
def test_a_server_without_pages_refuses_every_mode_but_none(mode: str) -> None:
    server = replace(SERVER, kv_reuse_pages=False)
    with pytest.raises(ParameterError, match=re.escape(f"diffusion_kv_reuse is {mode}, but this")):
        request_parameters({"diffusion_kv_reuse": mode}, server)
    assert request_parameters({"diffusion_kv_reuse": "none"}, server).kv_reuse == "none"
    both = rf"^diffusion.kv_reuse is {mode}, which needs diffusion.kv_reuse_pages"
    with pytest.raises(ParameterError, match=both):
        parse_server_settings({"diffusion": {"kv_reuse": mode, "kv_reuse_pages": False}}, "origin")
