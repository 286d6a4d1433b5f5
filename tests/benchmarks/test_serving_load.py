"""Loads of the serving benchmark without a server: dense requests, deadlines, resuming."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring.rows import read_rows
from benchmarks.serving import load as loads
from benchmarks.serving import run
from benchmarks.serving.load import Load, bench_arguments

SPARSE = Load(clients=4, requests=16, input_len=100, output_len=32, range_ratio=0.5, steps=8)


def test_dense_requests_say_so() -> None:
    arguments = bench_arguments(
        "http://host:1", "name", "folder", replace(SPARSE, attention="dense")
    )
    body = json.loads(arguments[arguments.index("--extra-body") + 1])
    assert body == {"vllm_xargs": {"diffusion_steps": 8, "sparsed_enabled": False}}


def test_loads_are_those_of_the_options() -> None:
    options = run.parse(["--clients", "1", "4", "--attention", "sparse", "dense", "--steps", "5"])
    found = run.all_loads(options)
    assert [(load.clients, load.requests, load.attention) for load in found] == [
        (1, 4, "sparse"),
        (1, 4, "dense"),
        (4, 16, "sparse"),
        (4, 16, "dense"),
    ]
    assert {load.steps for load in found} == {5}


def measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> list[tuple[int, str]]:
    """Run against a server that is not there; returns the loads that were put on it."""
    asked: list[tuple[int, str]] = []

    def run_load(
        address: str, model: str, tokenizer: str, load: Load, folder: Path, time_limit: float
    ) -> dict[str, Any]:
        asked.append((load.clients, load.attention))
        result: dict[str, Any] = {"completed": load.requests, "failed": 0, "duration": 2.0}
        result |= dict.fromkeys(("request", "output", "total_token"), 1.0)
        rates = ("request_throughput", "output_throughput", "total_token_throughput")
        percentiles = [f"p{p}_{x}_ms" for p in loads.PERCENTILES for x in ("ttft", "e2el")]
        return result | dict.fromkeys((*rates, *percentiles), 1.0)

    monkeypatch.setattr(loads, "run_load", run_load)
    monkeypatch.setattr(loads, "check_answers", lambda address, model, load: None)
    monkeypatch.setattr(run, "model_name", lambda address: "name")
    given = ["--url", "http://host", "--tokenizer", "folder", "--measure", "load"]
    assert run.main([*given, "--output", str(folder), *arguments]) == 0
    return asked


def test_resuming_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(tmp_path, monkeypatch, "--clients", "1") == [(1, "sparse")]
    more = ("--clients", "1", "4", "--resume")
    assert measured(tmp_path, monkeypatch, *more) == [(4, "sparse")]
    assert measured(tmp_path, monkeypatch, *more) == []
    rows = read_rows(tmp_path / loads.FILE)
    assert [(row["clients"], row["attention"], row["seconds"]) for row in rows] == [
        ("1", "sparse", "2"),
        ("4", "sparse", "2"),
    ]


def test_no_load_is_started_after_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measured(tmp_path, monkeypatch, "--clients", "1", "--minutes", "0") == []
    (row,) = read_rows(tmp_path / loads.FILE)
    assert row["note"] == "not started: the 0 minutes are used up" and not row["seconds"]
