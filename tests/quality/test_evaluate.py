"""The evaluation: its settings, its prompts, its shares of work, and runs through vLLM."""

import argparse
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm import LLM

from benchmarks.quality.answering import Asking
from benchmarks.quality.cases import Case, cached_cases, make_cases
from benchmarks.quality.evaluate import Unit, all_units, evaluate, parse, part_of, setting_of, share
from benchmarks.quality.results import (
    answers_path,
    merged_records,
    read_records,
    write_rows,
)
from benchmarks.quality.settings import (
    DENSE,
    Axes,
    Setting,
    compared_settings,
    keeps_keys_and_values,
    product_settings,
    shortcut_settings,
    sweep_settings,
)
from benchmarks.quality.similarity import read_overlaps
from small_model.tasks import TASKS, canvas_of
from vllm_sparsed.config.parameters import parse_server_settings, request_parameters

ROOT = Path(__file__).resolve().parents[2]
SPARSE = Setting(0.3, 0.2, 128)
SHORT = Setting(0.3, 0.2, 32)
EARLY = Setting(0.3, None, 128, schedule="from_start")
AXES = Axes((SPARSE, SHORT), (0.1, 0.3), (0.0, 0.2), (32, 64, 128))


@pytest.mark.parametrize(
    ("setting", "steps", "first"),
    [
        (DENSE, 32, 32),
        (SPARSE, 32, 8),
        (SPARSE, 2, 2),
        (Setting(0.3, 0.0, 32), 32, 2),
        (EARLY, 32, 0),
    ],
    ids=["dense", "sparse", "too-few-steps", "no-skip", "from-start"],
)
def test_first_sparse_step(setting: Setting, steps: int, first: int) -> None:
    assert setting.first_sparse_step(steps) == first


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(pattern="diagonal"), "pattern='diagonal' must be one of dense, sparsed, window"),
        (dict(schedule="never"), "schedule='never' must be one of reuse, from_start"),
        (dict(), "select and block_size belong to every setting but dense"),
        (dict(select=0.3, skip=0.2, block_size=32, pattern="dense"), "belong to every"),
        (dict(pattern="dense", pace="hurry"), "pace='hurry' must be one of fixed, threshold"),
        (dict(pattern="dense", kv_reuse="all"), "kv_reuse='all' must be one of none, prefix"),
        (dict(pattern="dense", kv_reuse="dual", refresh=8), "belong to kv_reuse='window'"),
        (dict(select=0.3, block_size=32), "skip to these where"),
        (dict(select=0.3, skip=0.2, block_size=32, schedule="from_start"), "skip to these where"),
    ],
)
def test_refuses_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**values)


def test_one_parameter_at_a_time() -> None:
    assert sweep_settings(AXES) == [
        replace(SPARSE, select=0.1),
        replace(SPARSE, skip=0.0),
        replace(SPARSE, block_size=64),
        replace(SHORT, select=0.1),
        replace(SHORT, skip=0.0),
    ]


def test_all_combinations() -> None:
    """Less the defaults, which are asked anyway."""
    product = product_settings(AXES)
    assert len(product) == 2 * 2 * 3 - 2
    assert Setting(0.1, 0.0, 64) in product
    assert SPARSE not in product


def test_baselines_and_ablations() -> None:
    names = [setting.name for setting in compared_settings(replace(AXES, defaults=(SPARSE,)))]
    assert names == [
        "window, select 0.3, skip 0.2, block 128",
        "window from step 0, select 0.3, block 128",
        "sink + window, select 0.3, skip 0.2, block 128",
        "sink + window from step 0, select 0.3, block 128",
        "from step 0, select 0.3, block 128",
        "heads share a pattern, select 0.3, skip 0.2, block 128",
        "rebuilt in every step, select 0.3, skip 0.2, block 128",
        "no isolated selection, select 0.3, skip 0.2, block 128",
    ]


def request_args(setting: Setting, canvas: int) -> dict[str, Any]:
    """Without those of attention."""
    args = setting.extra_args(canvas)
    return {name: value for name, value in args.items() if name.startswith("diffusion_")}


@pytest.mark.parametrize(
    ("setting", "args", "name"),
    [
        (DENSE, {"diffusion_steps": 512}, "dense"),
        (replace(DENSE, pace_value=4), {"diffusion_steps": 128}, "dense, 4 a pass"),
        (
            replace(DENSE, pace="threshold", pace_value=0.9),
            {"diffusion_threshold": 0.9},
            "dense, threshold 0.9",
        ),
        (
            replace(SPARSE, kv_reuse="dual"),
            {"diffusion_steps": 512, "diffusion_kv_reuse": "dual"},
            "select 0.3, skip 0.2, block 128, dual kept",
        ),
        (
            replace(DENSE, kv_reuse="window", refresh=64, margin=0),
            {
                "diffusion_steps": 512,
                "diffusion_kv_reuse": "window",
                "diffusion_refresh_tokens": 64,
                "diffusion_window_margin": 0,
            },
            "dense, window kept, refresh 64, margin 0",
        ),
    ],
    ids=["exact", "fixed", "threshold", "dual", "window"],
)
def test_shortcuts_are_request_parameters(
    setting: Setting, args: dict[str, Any], name: str
) -> None:
    assert request_args(setting, 512) == {"diffusion_block_length": 32, **args}
    assert setting.name == name
    assert setting.has_shortcuts == (setting != DENSE)


def test_a_whole_answer_in_one_pass() -> None:
    setting = replace(DENSE, pace_value=0)
    assert request_args(setting, 512) == {"diffusion_block_length": 512, "diffusion_steps": 1}
    assert setting.name == "dense, all in one pass"


def test_shortcuts_compare_each_alone_and_together() -> None:
    """The server takes every one of them; those that keep keys and values need its support."""
    server = parse_server_settings({}, "low_confidence")
    settings = shortcut_settings(AXES, kept=False)
    with_kept = shortcut_settings(AXES, kept=keeps_keys_and_values())
    assert len(with_kept) == len(set(with_kept)) > len(settings) > 20
    for setting in with_kept:
        request_parameters(setting.extra_args(128), server)
    assert set(settings) < set(with_kept)
    windows = [s for s in with_kept if s.kv_reuse == "window" and s.pace != "threshold"]
    assert {s.refresh for s in windows if s.is_dense} == {8, 16, 32, 64, 128, 256}
    assert {s.margin for s in windows if s.is_dense} == {0, 16, 32, 64}
    both = [s for s in with_kept if s.kv_reuse != "none" and s.pace == "threshold"]
    assert {s.is_dense for s in both} == {True, False}


def test_units() -> None:
    """Defaults at every length, all others at one, with fewer documents."""
    options = parse(["model", "--documents", "20", "--sweep-documents", "5"])
    units = all_units(options, AXES)
    assert units[:3] == [Unit(DENSE, length, 20) for length in (1024, 4096, 8192)]
    assert len(units) == 3 * 3 + 5 + 2 * 8
    assert {(unit.length, unit.documents) for unit in units[9:]} == {(4096, 5)}
    options.grid = "main"
    assert len(all_units(options, AXES)) == 9


def test_shares() -> None:
    """Every unit once, the loads even."""
    units = all_units(parse(["model"]), AXES)
    shares = [share(units, part, 4) for part in range(1, 5)]
    assert Counter(unit for mine in shares for unit in mine) == Counter(units)
    loads = [sum(unit.cost for unit in mine) for mine in shares]
    assert max(loads) - min(loads) <= min(unit.cost for unit in units)


@pytest.mark.parametrize("text", ["", "2", "0/5", "6/5", "a/b", "-1/5"])
def test_refuses_parts(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be like 2/5"):
        part_of(text)
    assert part_of("2/5") == (2, 5)


@pytest.mark.parametrize("text", ["0.3", "0.3,0.2", "0.3,0.2,128,1", "a,0.2,128", "0.3,0.2,x"])
def test_refuses_defaults(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be like 0\.3,0\.2,128"):
        setting_of(text)
    assert setting_of("0.3,0.2,128") == Setting(0.3, 0.2, 128)


def test_defaults_are_the_servers() -> None:
    parameters = request_parameters({}, parse_server_settings({}, "low_confidence"))
    by_length = [parameters.pattern_settings(length) for length in (4096, 1024)]
    asked = parse(["model"]).defaults
    assert [(setting.block_size, setting.select) for setting in asked] == by_length
    assert {setting.skip for setting in asked} == {parameters.sparsed_skip}


@pytest.mark.parametrize("length", [1024, 2048])
def test_prompts_fill_the_length(tokenizer_folder: Path, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    cases = make_cases(tokenizer, TASKS, [length], 3)
    assert [(case.task, case.document) for case in cases] == [
        (task, document) for task in TASKS for document in range(3)
    ]
    for case in cases:
        assert case.canvas == canvas_of(case.task)
        assert length * 0.8 < len(case.prompt) + case.canvas <= length
        answer = tokenizer.encode(case.answer, add_special_tokens=False)
        assert len(answer) < case.canvas
        text = tokenizer.decode(case.prompt)
        assert re.search(
            r"[?.]<\|eot_id|><|start_header_id|>assistant<\|end_header_id\|>\n\n$", text
        )


def test_prompts_fit_with_a_tokenizer_that_joins_lines(tokenizer_folder: Path) -> None:
    """One that needs more tokens for the whole than for its lines."""
    own = AutoTokenizer.from_pretrained(tokenizer_folder)

    class Longer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return own.encode(text, add_special_tokens=add_special_tokens)

        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
            ids = own.apply_chat_template(messages, **options)
            return ids + [0] * messages[0]["content"].count("\n")

    (case,) = make_cases(Longer(), ["single_needle"], [512], 1, canvas=32)
    assert 400 < len(case.prompt) + 32 <= 512


def test_cases_are_made_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def get(documents: int) -> list[Case]:
        return cached_cases(tmp_path, tokenizer, ["report", "multi_key"], [256], documents, 32)

    made = make_cases(tokenizer, ["report", "multi_key"], [256], 2, 32)
    assert get(2) == made
    (path,) = tmp_path.glob("report-256-2x32-*.json")
    path.write_text(path.read_text().replace('"report"', '"changed"'))
    assert [case.task for case in get(2)] == ["changed"] * 2 + ["multi_key"] * 2
    assert len(get(3)) == 6
    # Another tokenizer has files of its own.
    tokenizer.chat_template = "Q: {{ messages[0]['content'] }} A:"
    assert [case.task for case in get(2)] == ["report"] * 2 + ["multi_key"] * 2


def test_parts_through_vllm_are_one_run(llm: LLM, tmp_path: Path) -> None:
    """Settings are put into the engine in another order and in other company."""
    asking = Asking(canvas=32)
    cases = make_cases(llm.get_tokenizer(), ["multi_key"], [150, 200], 3, 32)
    settings = [DENSE, Setting(0.3, 0.2, 16), Setting(0.3, None, 16, "window", "from_start")]
    units = [Unit(setting, 150, 2) for setting in settings] + [Unit(DENSE, 200, 3)]
    lines: list[str] = []
    whole = evaluate(llm, cases, units, asking, lines.append)
    assert len(whole) == 9
    assert lines[0].startswith("dense; 150 tokens: ")
    assert "100% of the tokens in sparse steps" in lines[2]
    for part in (1, 2):
        mine = evaluate(llm, cases, share(units, part, 2), asking, lines.append)
        write_rows(answers_path(tmp_path, part, 2), mine)
    write_rows(tmp_path / "whole.csv", whole)
    merged = merged_records(tmp_path)
    # All but the time that they took.
    again = read_records(tmp_path / "whole.csv")
    timeless = [
        sorted(repr(replace(r, seconds=0.0)) for r in records) for records in (merged, again)
    ]
    assert timeless[0] == timeless[1]
    # A pass of these decides one token of a canvas of 32 and computes prompt and canvas.
    length = {(case.length, case.document): len(case.prompt) + 32 for case in cases}
    assert all(r.rows == r.steps * length[r.length, r.document] for r in merged)
    assert all(1 <= r.steps <= 32 and r.seconds > 0 for r in merged)
    density = {r.setting: r.density for r in merged if r.document == 0 and r.length == 150}
    assert density[DENSE] is None
    assert 0.3 < (density[settings[1]] or 0) < 0.5


@pytest.mark.slow
def test_commands_in_two_parts(tmp_path: Path, checkpoint: Path) -> None:
    """Two processes side by side share the work and the documents; then the report."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.quality.evaluate", checkpoint, "--output", out]
    command += ["--tasks", "multi_key", "report", "--lengths", "128", "160", "--documents", "4"]
    command += ["--sweep-length", "160", "--sweep-documents", "2", "--defaults", "0.3,0.2,16"]
    command += ["--block-size", "16", "--select", "0.3", "0.5", "--dtype", "float32"]
    running = [
        subprocess.Popen([*command, "--part", part], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for part in ("1/2", "2/2")
    ]
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "part 2 of 2 done" in printed[1]
    assert len(list((out / "cases").glob("*.json"))) == 4
    report = [sys.executable, "-m", "benchmarks.quality.report", out, "--no-plots"]
    text = subprocess.run(report, check=True, cwd=ROOT, capture_output=True, text=True).stdout

    records = merged_records(out)
    # Dense and the default: 4 documents, 2 tasks, 2 lengths; all others: 2 documents, 2 tasks.
    assert len(records) == 2 * 16 + (1 + 3 + 8) * 4
    assert text.count("| select 0.3, skip 0.2, block 16 | 160 | 8 | 0.") == 1
    assert len(read_overlaps(out / "similarity.csv")) == 2 * (32 * 32 + 4 * 4)
    here = [r for r in records if r.task == "report" and r.length == 160 and r.document < 2]
    default = Setting(0.3, 0.2, 16)
    for setting in (default, replace(default, pattern="window")):
        densities = [r.density for r in here if r.setting == setting]
        assert densities == [r.density for r in here if r.setting == default]
        assert len(densities) == 2 and 0.3 < (densities[0] or 0) < 0.5
