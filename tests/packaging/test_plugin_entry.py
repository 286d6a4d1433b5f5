"""vLLM finds the plugin by its entry point; loading it is cheap, and harmless when repeated."""

import configparser
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vllm_sparsed
from tests.packaging.commands import ROOT, run
from vllm_sparsed import plugin
from vllm_sparsed.models.registry import ENTRIES, MODELS, UNSERVED

HEAVY = ("torch", "vllm", "triton", "transformers", "numpy")


def run_program(program: str, cwd: Path) -> str:
    return run(sys.executable, "-c", program, cwd=cwd).splitlines()[-1]


@pytest.mark.parametrize("module", ["vllm_sparsed", "vllm_sparsed.plugin"])
def test_import_pulls_nothing_heavy(module: str, tmp_path: Path) -> None:
    program = (
        f"import sys, {module}\n"
        f"loaded = sorted(set({HEAVY}) & {{name.partition('.')[0] for name in sys.modules}})\n"
        "print(loaded)\n"
    )
    assert run_program(program, tmp_path) == "[]"


def test_entry_point() -> None:
    (entry,) = metadata.entry_points(group="vllm.general_plugins", name="sparsed")
    assert entry.value == "vllm_sparsed.plugin:register"
    assert entry.load() is plugin.register


def test_register_imports_nothing_that_only_a_diffusion_model_needs(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from vllm_sparsed.plugin import register\n"
        "register()\n"
        "print(sorted(name for name in sys.modules if name.startswith('vllm_sparsed')))\n"
    )
    assert run_program(program, tmp_path) == str(
        [
            "vllm_sparsed",
            "vllm_sparsed.attention",
            "vllm_sparsed.attention.registration",
            "vllm_sparsed.models",
            "vllm_sparsed.models.checkpoint_config",
            "vllm_sparsed.models.dream_tokenizer",
            "vllm_sparsed.models.registry",
            "vllm_sparsed.plugin",
        ]
    )


def test_register_is_idempotent(tmp_path: Path) -> None:
    # A subprocess: the test process may have registered before.
    program = """
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_sparsed.plugin import register

def tables():
    return (
        dict(MODELS_CONFIG_MAP),
        dict(ModelRegistry.models),
        {name: _CONFIG_REGISTRY[name] for name in _CONFIG_REGISTRY},
        {name: member.get_path() for name, member in AttentionBackendEnum.__members__.items()
         if name == "SPARSED"},
    )

before = tables()
register()
once = tables()
register()
assert tables() == once
new = [sorted(set(after) - set(first)) for after, first in zip(once, before)]
changed = [
    [key for key in first if first[key] != after[key]] for after, first in zip(once, before)
]
print(new, changed)
"""
    architectures = sorted(MODELS)
    model_types = sorted(
        {
            *(entry.model_type for entry in ENTRIES),
            *(model_type for model in UNSERVED for model_type in model.model_types),
        }
    )
    # Nothing that was there before is replaced.
    assert run_program(program, tmp_path) == str(
        [architectures, architectures, model_types, ["SPARSED"]]
    ) + " " + str([[], [], [], []])


def test_versions_agree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert vllm_sparsed.__version__ == version
    assert metadata.version("vllm_sparsed") == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
