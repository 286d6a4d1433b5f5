"""kernels/ is the source of vllm_sparsed.kernels, in every kind of install, and of nothing else."""

import hashlib
import json
import os
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import pytest

from tests.packaging.commands import ROOT, run

# Prints where the package comes from, and what answers to the name `kernels`.
PROBE = """
import importlib.util, json, vllm_sparsed, vllm_sparsed.kernels as kernels
top_level = importlib.util.find_spec("kernels")
print(json.dumps({
    "package": vllm_sparsed.__file__,
    "kernels": kernels.__file__,
    "name": kernels.__name__,
    "top_level": top_level.origin if top_level else None,
}))
"""


def kernel_sources(tree: Path) -> set[str]:
    return {path.relative_to(tree).as_posix() for path in (tree / "kernels").rglob("*.py")}


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert len(archive.namelist()) == len(set(archive.namelist()))
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def archives(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sources as main.zip and main.tar.gz, as forges offer them."""
    folder = tmp_path_factory.mktemp("archives")
    for name in ("main.zip", "main.tar.gz"):
        prefix = ("--prefix", "vllm_sparsed-main/")
        run("git", "archive", *prefix, "--output", folder / name, "HEAD", cwd=clone)
    return folder


@pytest.fixture(scope="session")
def linkless(archives: Path) -> Path:
    """A checkout whose link is a text file: Python's zipfile, and so pip, knows no links."""
    with zipfile.ZipFile(archives / "main.zip") as archive:
        archive.extractall(archives)
    tree = archives / "vllm_sparsed-main"
    assert (tree / "vllm_sparsed" / "kernels").read_text() == "../kernels"
    return tree


@pytest.fixture(
    scope="module",
    params=["wheel", "editable", "zip", "tar.gz", "git", "linkless", "linkless-editable"],
)
def install(
    request: pytest.FixtureRequest,
    new_environment: Callable[[Iterable[Path | str]], Path],
    clone: Path,
    archives: Path,
    linkless: Path,
) -> tuple[Path | None, Path]:
    """The tree of an editable install, and the interpreter of the environment that holds it."""
    kind = request.param
    tree = linkless if "linkless" in kind else clone
    if "editable" in kind:
        return tree, new_environment(["--editable", tree])
    sources: dict[str, Path | str] = {
        "zip": archives / "main.zip",
        "tar.gz": archives / "main.tar.gz",
        "git": f"git+file://{clone}",
        "linkless": linkless,
    }
    source = request.getfixturevalue("wheel") if kind == "wheel" else sources[kind]
    return None, new_environment([source])


def test_imports_from_anywhere(install: tuple[Path | None, Path], tmp_path: Path) -> None:
    tree, python = install
    found = json.loads(run(python, "-c", PROBE, cwd=tmp_path))
    home = tree or python.parents[1]
    assert Path(found["package"]).is_relative_to(home)
    assert Path(found["kernels"]).is_relative_to(home)
    assert found["name"] == "vllm_sparsed.kernels"
    top_level = Path(found["top_level"] or "/")
    assert not top_level.is_relative_to(home)


@pytest.mark.parametrize("has_link", [True, False])
def test_imports_at_the_root_of_a_checkout(has_link: bool, clone: Path, linkless: Path) -> None:
    """There the working tree comes first on the path, whatever is installed."""
    tree = clone if has_link else linkless
    found = json.loads(run(sys.executable, "-c", PROBE, cwd=tree))
    assert Path(found["package"]).is_relative_to(tree)
    kernels = tree / "vllm_sparsed" / "kernels" if has_link else tree / "kernels"
    assert Path(found["kernels"]) == kernels / "__init__.py"
    assert found["name"] == "vllm_sparsed.kernels"


def test_link_survives_clone(clone: Path) -> None:
    link = clone / "vllm_sparsed" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"


def test_top_level_init_is_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_bytes() == b""


def test_wheel_holds_every_kernel_once(wheel: Path, clone: Path) -> None:
    files = wheel_files(wheel)
    sources = kernel_sources(clone)
    assert "kernels/__init__.py" in sources
    packed = {name for name in files if "kernels" in PurePosixPath(name).parts}
    assert packed == {f"vllm_sparsed/{source}" for source in sources}
    for source in sources:
        assert files[f"vllm_sparsed/{source}"] == (clone / source).read_bytes()
    digests = Counter(hashlib.sha256(content).hexdigest() for content in files.values() if content)
    assert max(digests.values()) == 1


def test_wheel_holds_every_module(wheel: Path, clone: Path) -> None:
    package = clone / "vllm_sparsed"
    modules = {path.relative_to(clone).as_posix() for path in package.rglob("*.py")}
    modules |= {f"vllm_sparsed/{source}" for source in kernel_sources(clone)}
    files = wheel_files(wheel)
    assert {name for name in files if name.endswith(".py")} == modules
    assert "vllm_sparsed/py.typed" in files
    (top_level,) = (text for name, text in files.items() if name.endswith("/top_level.txt"))
    assert top_level.split() == [b"vllm_sparsed"]


@pytest.mark.parametrize("has_link", [True, False])
def test_sdist_builds_the_same_wheel(
    has_link: bool,
    wheel: Path,
    clone: Path,
    linkless: Path,
    build: Callable[[str, Path], Path],
    tmp_path: Path,
) -> None:
    with tarfile.open(build("sdist", clone if has_link else linkless)) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    from_sdist = wheel_files(build("wheel", tree))
    from_clone = wheel_files(wheel)
    assert from_sdist.keys() == from_clone.keys()
    assert all(from_sdist[name] == from_clone[name] for name in from_clone if name.endswith(".py"))


def test_transformers_and_vllm_import_at_root() -> None:
    # python -c puts the root on the path: ./kernels answers to the name `kernels`.
    program = (
        "import importlib.util, pathlib\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert pathlib.Path(spec.origin) == pathlib.Path('kernels/__init__.py').resolve(), spec\n"
        "import transformers, vllm\n"
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
        "from transformers.utils import is_kernels_available\n"
        "assert not is_kernels_available()\n"
        "from vllm import LLM\n"
        "print('imported')\n"
    )
    assert run(sys.executable, "-c", program, cwd=ROOT).splitlines()[-1] == "imported"
