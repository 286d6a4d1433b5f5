"""The commands of docs/recipes.md are such as `vllm serve` takes; its figures are computed."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sparsed.config.parameters import parse_server_settings
from vllm_sparsed.config.settings import pattern_store_size

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "recipes.md").read_text()
COMMANDS = [
    " ".join(found[1].replace("\\\n", " ").split())
    for found in re.finditer(r"^    (vllm serve (?:.*\\\n)*.*)$", PAGE, re.MULTILINE)
]
SHAPES = {"LLaDA-8B": (32, 32), "Dream-7B": (28, 28)}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith(tuple(f"| {name}" for name in SHAPES))
]


def parsed(command: str) -> argparse.Namespace:
    _, serve, *arguments = shlex.split(command)
    assert serve == "serve"
    return make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)


def shape_of(model: str) -> str:
    return "LLaDA-8B" if "LLaDA" in model else "Dream-7B"


@pytest.mark.parametrize("command", COMMANDS)
def test_vllm_takes_the_command(command: str) -> None:
    options = parsed(command)
    assert options.max_num_batched_tokens >= options.max_model_len
    server = parse_server_settings(options.additional_config or {}, "low_confidence")
    longest = server.sparsed_max_canvas or options.max_model_len
    assert server.default_canvas <= longest
    name = shape_of(options.model_tag)
    _, heads = SHAPES[name]
    assert heads % options.tensor_parallel_size == 0
    trained = {"LLaDA-8B": 4096, "Dream-7B": 2048}[name]
    if options.max_model_len > trained:
        rope = options.hf_overrides["rope_parameters"]
        assert rope["factor"] * trained == options.max_model_len
        assert rope["rope_theta"] == {"LLaDA-8B": 5e5, "Dream-7B": 1e6}[name]


def test_commands_and_rows_are_found() -> None:
    assert len(COMMANDS) == len(re.findall("^    vllm serve ", PAGE, re.MULTILINE)) >= 8
    assert len(ROWS) >= 8


def test_each_command_has_its_row() -> None:
    named = {(row[0], row[1].replace(",", ""), row[2].replace(",", ""), row[4]) for row in ROWS}
    for command in COMMANDS:
        options = parsed(command)
        key = (
            shape_of(options.model_tag),
            str(options.max_model_len),
            str(options.max_num_batched_tokens),
            str(options.tensor_parallel_size),
        )
        assert key in named, key


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_pattern_store(row: list[str]) -> None:
    name, context, batch, canvas, gpus, mib = (cell.replace(",", "") for cell in row)
    sparsed = {} if canvas == "any" else {"max_canvas": int(canvas)}
    server = parse_server_settings({"sparsed": sparsed}, "low_confidence")
    layers, heads = SHAPES[name]
    store = pattern_store_size(server, int(context), int(batch), short_rows=False)
    assert store is not None
    size = store.num_bytes(layers, heads // int(gpus))
    assert mib == f"{size / 2**20:.0f}"


def test_figures_of_a_full_pass_are_those_measured() -> None:
    notes = (Path(__file__).resolve().parents[1] / "benchmarks/notes/steps.md").read_text()
    for tokens, gib in (("4096", "15.7"), ("32768", "18.3"), ("65536", "21.7")):
        assert re.search(rf"^\| LLaDA-8B \| {tokens} \|.*\| {gib} \|$", notes, re.MULTILINE)
        assert f"{gib} GiB" in PAGE
    assert json.dumps(COMMANDS).count("sparsed") >= len(COMMANDS)
