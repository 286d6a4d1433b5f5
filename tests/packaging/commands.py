"""Commands that the packaging tests run in other folders and environments."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return what it prints; when it fails, show everything it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: Path | str, *arguments: str | Path, cwd: Path) -> None:
    """Run this environment's pip on an environment, without the network."""
    offline = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    command, *rest = arguments
    run(sys.executable, "-m", "pip", "--python", python, command, *offline, *rest, cwd=cwd)
