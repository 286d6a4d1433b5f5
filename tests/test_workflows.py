"""The workflows on GitHub run the Makefile's commands, with actions of stated versions."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return found


def commands(path: Path) -> list[str]:
    """What a workflow runs, written out for each entry of a matrix."""
    lines = []
    for job in jobs(path).values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            command = step.get("run")
            for name, values in matrix.items() if command and "matrix." in command else []:
                place = f"${{{{ matrix.{name} }}}}"
                lines += [command.replace(place, value) for value in values]
            if command and "matrix." not in command:
                lines.append(command)
    return lines


def test_there_is_one_for_each_question() -> None:
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheel"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_runs_commands_of_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {target for names in targets for target in names.split()}
    assert commands(path)
    for command in commands(path):
        make, *wanted = command.split()
        assert make == "make"
        assert set(wanted) <= known, command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_have_versions_and_jobs_have_ends(path: Path) -> None:
    for job in jobs(path).values():
        assert job["timeout-minutes"] <= 60
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", step["uses"])


def test_all_parts_of_make_test_are_run() -> None:
    """`make test` may gain a part; the workflows then have to gain it too."""
    makefile = (ROOT / "Makefile").read_text()
    rule = re.search(r"^test:(.*)\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert rule is not None
    parts = set(rule[1].split()) | set(re.findall(r"\$\(MAKE\) (\S+)", rule[2]))
    run = {target for path in WORKFLOWS for line in commands(path) for target in line.split()[1:]}
    assert parts <= run
