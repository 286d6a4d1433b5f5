"""The commands in their small form, each in processes of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine.breakdown import PARTS
from benchmarks.measuring.rows import read_rows
from benchmarks.requests import tables
from benchmarks.requests.options import parse
from benchmarks.requests.run import jobs, measurements

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tests/golden/llada-mha"


def run(module: str, *arguments: str) -> str:
    # Other tests of the same session may have set what only an engine in this process wants.
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_decoding_step() -> None:
    printed = run("benchmarks.kernels.decoding", "--small")
    for way in ("greedy, scheduled", "threshold", "entropy bound", "temperature, top_p, top_k"):
        assert printed.count(f": {way} ") == 2


def test_whole_requests(tmp_path: Path) -> None:
    """The one engine start of this folder's quick tests; the weights are drawn in it."""
    model = tmp_path / "shape"
    model.mkdir()
    shutil.copy(ROOT / MODEL / "config.json", model)
    arguments = ("--small", "--models", str(model), "--whole", "150", "--output", str(tmp_path))
    printed = run("benchmarks.requests.run", *arguments)
    assert "relative error of the served logits" in printed
    resumed = run("benchmarks.requests.run", *arguments, "--resume")
    assert f"{model}, ours: all there" in resumed and f"{model}, plain: all there" in resumed
    assert "extrapolated from 2 dense, 1 building, 2 sparse steps" in printed
    steps = read_rows(tmp_path / tables.STEPS_FILE)
    found = {(row["provider"], row["kind"]) for row in steps if float(row["ms"]) > 0}
    assert found == {
        (provider, kind)
        for provider in tables.PROVIDERS
        for kind in (("dense", "building", "sparse") if "parse" in provider else ("dense",))
    }
    totals = read_rows(tmp_path / tables.TOTALS_FILE)
    whole = [row for row in totals if row["extrapolated"] == "False"]
    totals = [row for row in totals if row["extrapolated"] == "True"]
    assert [(row["provider"], row["length"], row["total_steps"]) for row in whole] == [
        (provider, "150", "16") for provider in (tables.OURS_DENSE, tables.OURS_SPARSE)
    ]
    assert all(float(row["seconds"]) > 0 for row in whole)
    assert {(row["provider"], row["total_steps"]) for row in totals} == {
        (provider, total) for provider in tables.PROVIDERS for total in ("16", "64")
    }
    for row in totals:
        kinds = {r["kind"]: float(r["ms"]) for r in steps if r["provider"] == row["provider"]}
        if row["total_steps"] == "16":
            # int(16 * 0.2) + 1 = 4
            counts = {"dense": 4, "building": 1, "sparse": 11} if len(kinds) > 1 else {"dense": 16}
            expected = sum(count * kinds[kind] for kind, count in counts.items()) / 1e3
            assert float(row["seconds"]) == pytest.approx(expected, rel=1e-3)
    # The same weights, patterns built by our kernels and by the plain loop from other tokens.
    densities = {r["provider"]: float(r["density"]) for r in totals}
    assert densities[tables.OURS_DENSE] == densities[tables.PLAIN_DENSE] == 1.0
    assert densities[tables.OURS_SPARSE] == pytest.approx(densities[tables.PLAIN_SPARSE], abs=0.1)
    parts = read_rows(tmp_path / tables.BREAKDOWN_FILE)
    assert [(row["kind"], row["part"]) for row in parts] == [
        (kind, part) for kind in ("dense", "building", "sparse") for part in PARTS
    ]
    of_dense = {row["part"]: float(row["ms"]) for row in parts if row["kind"] == "dense"}
    assert of_dense["linear"] > 0 and of_dense["attention"] > 0


def test_serving(tmp_path: Path) -> None:
    run("benchmarks.serving.run", "--small", "--output", str(tmp_path))
    (row,) = read_rows(tmp_path / "serving.csv")
    assert (row["completed"], row["failed"], row["note"]) == ("4", "0", "")
    assert 0 < float(row["first_block_ms_p50"]) <= float(row["latency_ms_p50"])
    overheads = read_rows(tmp_path / "overhead.csv")
    assert [row["batch_size"] for row in overheads] == ["1", "4"]
    for row in overheads:
        assert 0 < float(row["overhead_ms"]) < float(row["wall_ms"])


def test_mixed_lengths(tmp_path: Path) -> None:
    run("benchmarks.serving.mixed", "--small", "--output", str(tmp_path))
    rows = read_rows(tmp_path / "mixed_lengths.csv")
    assert [(row["phase"], row["kind"]) for row in rows] == [
        (phase, kind)
        for phase, kinds in (("alone", ["chat"]), ("alone", ["long"]), ("mixed", ["chat", "long"]))
        for kind in kinds
    ]
    for row in rows:
        assert row["failed"] == "0" and float(row["latency_ms_p50"]) > 0


def test_the_usual_run_measures_what_it_should() -> None:
    options = parse([])
    found = [str(job) for job in jobs(options)]
    assert found == [
        f"{model}, {job}"
        for model in ("llada-8b", "dream-7b")
        for job in ("ours", "plain", "ours, fp8")
    ]
    ours = measurements(options, "ours")
    # A time budget cuts from the end: the length that most goals are about comes first.
    assert [what.length for what in ours] == [65536, 32768, 16384, 4096]
    assert [what.dense_steps for what in ours] == [2, 2, 6, 6]
    plain = {what.length: what for what in measurements(options, "plain")}
    assert (plain[16384].dense_steps, plain[16384].pattern_layers) == (2, 0)
    assert (plain[65536].dense_steps, plain[65536].pattern_layers) == (1, 2)
    one = parse(["--measure", "ours", "--models", "a", "--quantizations", "fp8"])
    assert [str(job) for job in jobs(one)] == ["a, ours, fp8"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lengths", "1024"], "--lengths"),
        (["--plain-lengths", "512"], "--plain-lengths"),
        (["--whole", "512"], "--whole"),
        (["--backend", "FLASH_ATTN"], "--backend"),
        (["--sparse-steps", "0"], "--sparse-steps"),
    ],
)
def test_bad_arguments_name_themselves(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert named in capsys.readouterr().err
