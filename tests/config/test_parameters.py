"""Parameters: every bad value is refused by name, every good one arrives in its type."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparsed.config.parameter_table import PACES, PARAMETERS
from vllm_sparsed.config.parameters import (
    ParameterError,
    RequestParameters,
    ServerSettings,
    parameter_table,
    parse_server_settings,
    request_parameters,
)
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES

SERVER = parse_server_settings({}, "low_confidence")
# This one allows any request.
WIDE = parse_server_settings(
    {"diffusion": {"show_canvas": True, "kv_reuse": "window"}}, "low_confidence"
)

GOOD = {
    "diffusion_steps": [(1, 1), (64.0, 64), (2**31 - 1, 2**31 - 1)],
    "diffusion_threshold": [(1, 1.0), (0.9, 0.9), (1e-9, 1e-9)],
    "diffusion_factor": [(1, 1.0), (1e9, 1e9), (1e-9, 1e-9)],
    "diffusion_entropy_bound": [(0, 0.0), (0.1, 0.1), (1e9, 1e9)],
    "diffusion_entropy_threshold": [(0.4, 0.4), (1e9, 1e9)],
    "diffusion_block_add": [(1, 1.0), (0.1, 0.1)],
    "diffusion_block_full": [(1, 1.0), (0.95, 0.95)],
    "diffusion_block_length": [(1, 1), (32.0, 32)],
    "diffusion_alg": [
        (name, name)
        for name in (
            "low_confidence",
            "random",
            "origin",
            "maskgit_plus",
            "topk_margin",
            "entropy",
        )
    ],
    "diffusion_alg_temp": [(0, 0.0), (0.5, 0.5), (3, 3.0)],
    "diffusion_eps": [(1e-3, 1e-3), (0.999, 0.999)],
    "diffusion_cfg_scale": [(0, 0.0), (1.5, 1.5)],
    "diffusion_kv_reuse": [(name, name) for name in ("none", "prefix", "dual", "window")],
    "diffusion_warmup_passes": [(1, 1), (3.0, 3)],
    "diffusion_refresh_tokens": [(1, 1), (128.0, 128)],
    "diffusion_refresh_passes": [(1, 1), (7, 7)],
    "diffusion_window_margin": [(0, 0), (64, 64)],
    "diffusion_top_p": [(1, 1.0), (0.01, 0.01)],
    "diffusion_top_k": [(0, 0), (50.0, 50)],
    "sparsed_skip": [(0, 0.0), (0.99, 0.99)],
    "sparsed_select": [(1, 1.0), (0.01, 0.01)],
    "sparsed_block_size": [(16, 16), (32, 32), (64.0, 64), (128, 128)],
}
FLAGS = (
    "diffusion_logits_eos_inf",
    "diffusion_confidence_eos_eot_inf",
    "diffusion_infill",
    "diffusion_show_canvas",
    "sparsed_enabled",
    "sparsed_dense_if_faster",
)
for flag in FLAGS:
    GOOD[flag] = [(v, True) for v in (True, 1, 1.0, "true", "True")]
    GOOD[flag] += [(v, False) for v in (False, 0, 0.0, "false")]

NOT_NUMBERS = [True, "1", "nan", [1], {}, float("nan"), float("inf"), -float("inf"), 10**400]
BAD = {
    "diffusion_steps": [*NOT_NUMBERS, 0, -1, 1.5, 2**31, 1e300],
    "diffusion_threshold": [*NOT_NUMBERS, 0, -0.1, 1.01],
    "diffusion_factor": [*NOT_NUMBERS, 0, -1],
    "diffusion_entropy_bound": [*NOT_NUMBERS, -1e-9],
    "diffusion_entropy_threshold": [*NOT_NUMBERS, 0, -1],
    "diffusion_block_add": [*NOT_NUMBERS, 0, 1.01],
    "diffusion_block_full": [*NOT_NUMBERS, 0, 1.01],
    "diffusion_block_length": [*NOT_NUMBERS, 0, 0.5, 2**31],
    "diffusion_alg": [1, True, "", "Origin", ["origin"], "low_confidence "],
    "diffusion_alg_temp": [*NOT_NUMBERS, -0.1, 1e7, None],
    "diffusion_eps": [*NOT_NUMBERS, 0, 1, 1.0, -1e-9],
    "diffusion_cfg_scale": [*NOT_NUMBERS, -1e-9, 1e7],
    "diffusion_kv_reuse": [1, True, "", "Window", ["dual"]],
    "diffusion_warmup_passes": [*NOT_NUMBERS, 0, -1, 1.5, 2**31],
    "diffusion_refresh_tokens": [*NOT_NUMBERS, 0, -1, 1.5, 2**31],
    "diffusion_refresh_passes": [*NOT_NUMBERS, 0, -1, 1.5, 2**31],
    "diffusion_window_margin": [*NOT_NUMBERS, -1, 0.5, 2**31],
    "diffusion_top_p": [*NOT_NUMBERS, 0, 1.01],
    "diffusion_top_k": [*NOT_NUMBERS, -1, 0.5, 2**31],
    "sparsed_skip": [*NOT_NUMBERS, 1, 1.0, -0.1],
    "sparsed_select": [*NOT_NUMBERS, 0, 1.01],
    "sparsed_block_size": [*NOT_NUMBERS, 8, 48, 256, 32.5],
}
for flag in FLAGS:
    BAD[flag] = [2, -1, 0.5, "yes", "", [], {}, float("nan"), None]

PER_REQUEST = {
    parameter.request_key: parameter for parameter in PARAMETERS if parameter.per_request
}


# What a value needs beside it.
COMPANIONS = {
    "diffusion_block_add": {"diffusion_threshold": 0.9},
    "diffusion_block_full": {"diffusion_threshold": 0.9, "diffusion_block_add": 0.1},
}


def cases(table: dict[str, list]) -> list:
    return [
        pytest.param(key, value, id=f"{key}-{str(value)[:20]}-{index}")
        for key, values in table.items()
        for index, value in enumerate(values)
    ]


def test_the_cases_are_of_all_parameters() -> None:
    assert set(GOOD) == set(BAD) == set(PER_REQUEST)


@pytest.mark.parametrize(("key", "case"), cases(GOOD))
def test_good_value(key: str, case: tuple[object, object]) -> None:
    given_value, value = case
    parameter = PER_REQUEST[key]
    others = COMPANIONS.get(key, {})
    parsed = getattr(request_parameters({key: given_value, **others}, WIDE), parameter.field)
    assert parsed == value
    assert type(parsed) is type(value)
    section = {name.removeprefix("diffusion_"): other for name, other in others.items()}
    server = parse_server_settings(
        {parameter.group: {parameter.name: given_value, **section}}, "maskgit_plus"
    )
    assert getattr(server.defaults, parameter.field) == value


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_bad_value_is_refused_by_name(key: str, value: object) -> None:
    parameter = PER_REQUEST[key]
    with pytest.raises(ParameterError) as refusal:
        request_parameters({key: value}, SERVER)
    assert str(refusal.value).startswith(f"{key} is ")
    assert parameter.allowed in str(refusal.value)
    assert len(str(refusal.value)) < 300
    with pytest.raises(ParameterError, match=rf"^{parameter.group}\.{parameter.name} is "):
        parse_server_settings({parameter.group: {parameter.name: value}}, "random")


@pytest.mark.parametrize("value", [10**5000, -(10**5000), [10**5000]], ids=["int", "-int", "list"])
def test_integer_beyond_the_digits_that_python_prints(value: object) -> None:
    with pytest.raises(ParameterError) as refusal:
        request_parameters({"diffusion_steps": value}, SERVER)
    assert str(refusal.value).startswith("diffusion_steps is a number of too many digits, but must")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(sorted(PER_REQUEST)) | st.text(max_size=5), JSON))
def test_anything_else_raises_parameter_error_alone(extra_args: dict[str, object]) -> None:
    with contextlib.suppress(ParameterError):
        parameters = request_parameters(extra_args, SERVER)
        assert set(extra_args) <= {*PER_REQUEST, "session_id"}
        assert isinstance(parameters, RequestParameters)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("diffusion_step", "Did you mean diffusion_steps?"),
        ("sparsed_blocksize", "Did you mean sparsed_block_size?"),
        ("steps", "Allowed here: diffusion_steps, "),
        ("diffusion_default_canvas", "Allowed here: diffusion_steps, "),
        ("sparsed_max_canvas", "is not a parameter"),
        (7, "7 is not a parameter"),
    ],
)
def test_unknown_request_key(key: object, hint: str) -> None:
    with pytest.raises(ParameterError) as refusal:
        request_parameters({key: 1}, SERVER)
    assert str(refusal.value).startswith(f"{key!r} is not a parameter.")
    assert hint in str(refusal.value)


def test_foreign_keys_change_nothing() -> None:
    assert request_parameters({"session_id": "x"}, SERVER) == request_parameters(None, SERVER)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"diffusion": {"stepps": 1}}, "'diffusion.stepps' is not a parameter. Did you mean"),
        ({"sparsed": {"steps": 1}}, "'sparsed.steps' is not a parameter."),
        ({"diffusion": [1]}, "diffusion is [1], but must be a JSON object."),
        ({"sparsed": None}, "sparsed is None, but must be a JSON object."),
        ({"diffusion": {"default_canvas": 0}}, "diffusion.default_canvas is 0"),
        ({"sparsed": {"max_canvas": "1k"}}, "sparsed.max_canvas is '1k'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_server_configuration(config: dict[str, object], message: str) -> None:
    with pytest.raises(ParameterError) as refusal:
        parse_server_settings(config, "origin")
    assert str(refusal.value).startswith(message)


def test_defaults() -> None:
    expected = ServerSettings(
        defaults=RequestParameters(
            steps=None,
            threshold=None,
            factor=None,
            entropy_bound=None,
            entropy_threshold=None,
            block_add=None,
            block_full=None,
            block_length=None,
            alg="low_confidence",
            alg_temp=0.0,
            eps=1e-3,
            cfg_scale=0.0,
            top_p=None,
            top_k=None,
            infill=False,
            logits_eos_inf=False,
            confidence_eos_eot_inf=False,
            kv_reuse="none",
            warmup_passes=1,
            refresh_tokens=None,
            refresh_passes=None,
            window_margin=16,
            show_canvas=False,
            sparsed_enabled=True,
            sparsed_dense_if_faster=True,
            sparsed_skip=0.2,
            sparsed_select=None,
            sparsed_block_size=None,
        ),
        default_canvas=128,
        kv_reuse_pages=None,
        sparsed_max_canvas=None,
        sparsed_flash_attention_4=True,
    )
    assert expected == SERVER


@pytest.mark.parametrize(
    ("server", "extra_args", "block_length"),
    [
        pytest.param({}, {}, 32, id="llada"),
        pytest.param({}, {"diffusion_alg": "random"}, 32, id="llada-random"),
        pytest.param({}, {"diffusion_alg": "origin"}, None, id="dream"),
        pytest.param({"block_length": 8}, {"diffusion_alg": "entropy"}, 8, id="server"),
        pytest.param({"block_length": 8}, {"diffusion_block_length": 4}, 4, id="request"),
        pytest.param({"alg": "topk_margin"}, {}, None, id="server-algorithm"),
        pytest.param(
            {"alg": "entropy"}, {"diffusion_entropy_bound": 1}, 32, id="dream-with-a-pace"
        ),
        pytest.param({"alg": "entropy", "entropy_bound": 1}, {}, 32, id="dream-server-pace"),
    ],
)
def test_block_length_by_algorithm(server, extra_args, block_length) -> None:
    settings = parse_server_settings({"diffusion": server}, "low_confidence")
    assert request_parameters(extra_args, settings).block_length == block_length


ALGORITHMS = ("low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy")


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("pace", PACES)
def test_every_pace_with_every_algorithm(pace: str, alg: str) -> None:
    asked = {f"diffusion_{pace}": 0.5, "diffusion_alg": alg}
    if alg in PACES[pace]:
        assert request_parameters(asked, SERVER).pace == (pace, 0.5)
        return
    message = rf"^diffusion_{pace} does not go with diffusion_alg {alg}, but with low_confidence"
    with pytest.raises(ParameterError, match=message):
        request_parameters(asked, SERVER)
    with pytest.raises(ParameterError, match=rf"^diffusion.{pace} .* diffusion.alg {alg}"):
        parse_server_settings({"diffusion": {pace: 0.5, "alg": alg}}, "low_confidence")


@pytest.mark.parametrize(
    ("server", "extra_args", "message"),
    [
        (
            {},
            {"diffusion_threshold": 0.9, "diffusion_entropy_bound": 1},
            "diffusion_threshold and diffusion_entropy_bound do not go together",
        ),
        (
            {},
            {"diffusion_factor": 1, "diffusion_alg_temp": 0.5},
            "diffusion_factor does not go with diffusion_alg_temp 0.5",
        ),
        (
            {"alg_temp": 0.5},
            {"diffusion_factor": 1},
            "diffusion_factor does not go with the server default diffusion_alg_temp 0.5",
        ),
        (
            {"threshold": 0.9},
            {"diffusion_alg": "random"},
            "the server default diffusion_threshold does not go with diffusion_alg random",
        ),
        ({}, {"diffusion_block_add": 0.1}, "diffusion_block_add does not go without a pace"),
        (
            {},
            {"diffusion_block_add": 0.1, "diffusion_factor": 1},
            "diffusion_block_add does not go with diffusion_factor",
        ),
        (
            {},
            {"diffusion_block_full": 0.9, "diffusion_threshold": 0.9},
            "diffusion_block_full has no effect without diffusion_block_add",
        ),
    ],
)
def test_what_does_not_go_with_a_pace(server, extra_args, message: str) -> None:
    settings = parse_server_settings({"diffusion": server}, "low_confidence")
    with pytest.raises(ParameterError) as refusal:
        request_parameters(extra_args, settings)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "config", [{"threshold": 0.9, "factor": 1}, {"block_add": 0.1}, {"block_full": 0.9}]
)
def test_a_server_is_not_started_with_what_does_not_go_together(config) -> None:
    with pytest.raises(ParameterError, match=r"^diffusion\."):
        parse_server_settings({"diffusion": config}, "low_confidence")


def test_a_request_s_pace_takes_the_place_of_the_server_s() -> None:
    settings = parse_server_settings(
        {"diffusion": {"threshold": 0.9, "block_add": 0.1, "steps": 64}}, "low_confidence"
    )
    default = request_parameters({}, settings)
    assert (default.pace, default.block_add, default.steps) == (("threshold", 0.9), 0.1, 64)
    own = request_parameters({"diffusion_factor": 1}, settings)
    assert (own.pace, own.block_add, own.steps) == (("factor", 1.0), None, 64)
    capped = request_parameters({"diffusion_steps": 8}, settings)
    assert (capped.pace, capped.steps) == (("threshold", 0.9), 8)


def test_a_request_keeps_the_server_defaults_it_does_not_set() -> None:
    settings = parse_server_settings(
        {
            "diffusion": {"steps": 9, "alg": "entropy", "default_canvas": 64},
            "sparsed": {"enabled": False, "max_canvas": 512},
            "of_others": {"steps": 1},
        },
        "low_confidence",
    )
    assert (settings.default_canvas, settings.sparsed_max_canvas) == (64, 512)
    assert request_parameters({"diffusion_steps": None}, settings).steps == 9
    parameters = request_parameters({"diffusion_eps": 0.5}, settings)
    assert (parameters.steps, parameters.alg, parameters.eps) == (9, "entropy", 0.5)
    assert parameters.sparsed_enabled is False


@pytest.mark.parametrize("server", [{}, {"select": 0.1, "block_size": 128}])
def test_the_documented_defaults_may_be_given(server: dict[str, object]) -> None:
    """Whether the store holds them depends on the length, so it is no error."""
    settings = parse_server_settings({"sparsed": server}, "low_confidence")
    for length in (1, 2048, 2049, 65536):
        block_size, select = SERVER.defaults.pattern_settings(length)
        asked = {"sparsed_block_size": block_size, "sparsed_select": select}
        parameters = request_parameters(asked, settings)
        assert parameters.pattern_settings(length) == (block_size, select)


@pytest.mark.parametrize(
    ("server", "extra_args", "short", "long"),
    [
        ({}, {}, (32, 0.5), (128, 0.3)),
        ({"select": 0.4}, {}, (32, 0.4), (128, 0.4)),
        ({"block_size": 64}, {}, (64, 0.5), (64, 0.3)),
        ({"block_size": 64, "select": 0.9}, {}, (64, 0.9), (64, 0.9)),
        ({}, {"sparsed_select": 0.2}, (32, 0.2), (128, 0.2)),
        ({}, {"sparsed_block_size": 128}, (128, 0.5), (128, 0.3)),
        ({"block_size": 16}, {"sparsed_block_size": 32}, (32, 0.5), (32, 0.3)),
        ({"select": 0.4}, {"sparsed_select": None}, (32, 0.4), (128, 0.4)),
    ],
)
def test_what_nobody_gives_is_as_released_for_the_length(server, extra_args, short, long) -> None:
    settings = parse_server_settings({"sparsed": server}, "low_confidence")
    parameters = request_parameters(extra_args, settings)
    assert [parameters.pattern_settings(n) for n in (1, 2048)] == [short, short]
    assert [parameters.pattern_settings(n) for n in (2049, 65536)] == [long, long]
    assert {short[0], long[0]} <= set(BLOCK_SIZES)


@given(st.integers(1, 9999), st.floats(0, 1, exclude_min=True), st.none() | st.integers(1, 9999))
def test_settings_survive_json(canvas: int, select: float, max_canvas: int | None) -> None:
    settings = parse_server_settings(
        {
            "diffusion": {"default_canvas": canvas},
            "sparsed": {"select": select, "max_canvas": max_canvas},
        },
        "entropy",
    )
    assert ServerSettings.from_json(settings.to_json()) == settings
    json.loads(settings.to_json())


def test_fields_are_those_of_the_definitions() -> None:
    assert {field.name for field in fields(RequestParameters)} == {
        parameter.field for parameter in PER_REQUEST.values()
    }
    assert set(asdict(SERVER)) - {"defaults"} == {
        parameter.field for parameter in PARAMETERS if not parameter.per_request
    }


def test_table_has_every_parameter() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in parameter_table().splitlines()[2:]
    ]
    assert [row[1] for row in rows] == [f"`{parameter.server_key}`" for parameter in PARAMETERS]
    for row, parameter in zip(rows, PARAMETERS, strict=True):
        assert len(row) == 5
        assert row[0] == (f"`{parameter.request_key}`" if parameter.per_request else "-")
        assert row[2] == parameter.allowed


def test_import_is_light() -> None:
    program = (
        "import sys, vllm_sparsed.config.parameters\n"
        "assert not {'torch', 'vllm', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_canvases_are_shown_where_the_server_allows_it() -> None:
    asked = {"diffusion_show_canvas": 1}
    with pytest.raises(ParameterError, match=r"^diffusion_show_canvas is true, but this"):
        request_parameters(asked, SERVER)
    allowing = parse_server_settings({"diffusion": {"show_canvas": True}}, "low_confidence")
    assert request_parameters(asked, allowing).show_canvas
    # A permission, not a default.
    assert not request_parameters({}, allowing).show_canvas
    assert ServerSettings.from_json(allowing.to_json()) == allowing
