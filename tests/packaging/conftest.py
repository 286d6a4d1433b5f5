"""A clone of this package's sources, and environments that it is installed into."""

import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.packaging.commands import ROOT, pip, run

SOURCES = (
    *("setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"),
    *("kernels", "vllm_sparsed"),
)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git clone of the working tree's sources."""
    origin = tmp_path_factory.mktemp("origin")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, origin / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, origin / name)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    run(*git, "init", "--quiet", cwd=origin)
    run(*git, "add", "--all", cwd=origin)
    run(*git, "commit", "--quiet", "--message", "sources", cwd=origin)
    target = tmp_path_factory.mktemp("clone") / "checkout"
    run("git", "clone", "--quiet", origin, target, cwd=origin)
    return target


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Returns a function that builds the sdist or the wheel of a source tree, in a copy of it."""

    def build_in_copy(kind: str, tree: Path) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        shutil.copytree(tree, folder / "tree", symlinks=True)
        hook = f"from setuptools.build_meta import build_{kind} as build; build({str(folder)!r})"
        run(sys.executable, "-c", hook, cwd=folder / "tree")
        (built,) = (path for path in folder.iterdir() if path.is_file())
        return built

    return build_in_copy


@pytest.fixture(scope="session")
def wheel(build: Callable[[str, Path], Path], clone: Path) -> Path:
    return build("wheel", clone)


@pytest.fixture(scope="session")
def new_environment(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Iterable[Path | str]], Path]:
    """Returns a function that makes a virtual environment and installs this package into it.

    What this environment holds can be imported there too, save its editable installs: files that a
    .pth line names as a folder are importable, but .pth files in that folder are not read.
    """

    def create(install_arguments: Iterable[Path | str]) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
        python = folder / "bin" / "python"
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(run(python, "-c", query, cwd=folder).strip())
        (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # The parent's editable install of this package would otherwise count as the one to replace.
        pip(python, "install", "--ignore-installed", *install_arguments, cwd=folder)
        return python

    return create
