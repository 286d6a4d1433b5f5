"""vLLM finds the plugin by its entry point; loading it is cheap, and harmless when repeated."""

import configparser
import json
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
            "vllm_sparsed.frontend",
            "vllm_sparsed.models",
            "vllm_sparsed.models.checkpoint_config",
            "vllm_sparsed.models.dream_tokenizer",
            "vllm_sparsed.models.registry",
            "vllm_sparsed.models.rotary_parameters",
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


# Prints which entries there are after each case, what was logged, and whether Llama still starts.
STRANGE_VLLM = """
import json, logging, sys
from pathlib import Path
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import config as models_config, registry
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry
from vllm.transformers_utils import config as checkpoint_configs
from vllm.v1.attention.backends import registry as backends
from vllm_sparsed.plugin import register

class Lines(logging.Handler):
    def emit(self, record):
        lines.append((record.levelname, record.getMessage()))

lines = []
logging.getLogger("vllm.vllm_sparsed").addHandler(Lines())

def entries():
    tables = (
        models_config.__dict__.get("MODELS_CONFIG_MAP", {}),
        registry.ModelRegistry.models,
        checkpoint_configs.__dict__.get("_CONFIG_REGISTRY", {}),
        RENDERER_REGISTRY.renderers,
        TokenizerRegistry.tokenizers,
    )
    names = ("LLaDAModelLM", "DreamModel", "llada", "Dream", "masked_diffusion")
    return [name for table in tables for name in names if name in table]

def refuse(*args, **kwargs):
    raise TypeError("register_backend() takes 3 positional arguments")

def read_only(*args):
    raise AttributeError("this table is read-only now")

found = {"installed": vllm.__version__}
cases = [(f"version {v}", vllm, "__version__", v) for v in ("0.31.2", "0.34.0", "1.0", "dev")]
cases += [
    ("no table of checkpoints", checkpoint_configs, "_CONFIG_REGISTRY", None),
    ("no table of hooks", models_config, "MODELS_CONFIG_MAP", None),
    ("another kind of table", models_config, "MODELS_CONFIG_MAP", []),
    ("no way to register", registry._ModelRegistry, "register_model", None),
    ("a read-only registry", registry._ModelRegistry, "register_model", read_only),
    ("another signature", backends, "register_backend", refuse),
]
for name, owner, attribute, value in cases:
    before = getattr(owner, attribute)
    delattr(owner, attribute)
    if value is not None:
        setattr(owner, attribute, value)
    lines.clear()
    register()
    register()
    setattr(owner, attribute, before)
    found[name] = (lines[:], entries())

Path("config.json").write_text(json.dumps({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64,
}))
config = EngineArgs(".", skip_tokenizer_init=True).create_engine_config()
found["llama"] = config.model_config.architecture
register()
found["afterwards"] = entries()
print(json.dumps(found))
"""


def test_register_leaves_a_vllm_alone_that_it_does_not_know(tmp_path: Path) -> None:
    """Other models start, one warning names both versions, and nothing is half registered."""
    found = json.loads(run_program(STRANGE_VLLM, tmp_path))
    assert found.pop("llama") == "LlamaForCausalLM"
    assert len(found.pop("afterwards")) == 8
    installed = found.pop("installed")
    assert len(found) == 10
    for case, (lines, left) in found.items():
        assert not left, case
        ((level, message),) = lines
        assert level == "WARNING", case
        assert f"vllm_sparsed {vllm_sparsed.__version__} (for vLLM 0.32 and 0.33)" in message
        version = case.removeprefix("version ") if "version" in case else installed
        assert f"with vLLM {version}: " in message, case


def test_a_vllm_whose_plugins_fail_early_is_left_alone(tmp_path: Path) -> None:
    """In vLLM's own way in, where an exception would end every server of the installation."""
    program = """
import vllm
vllm.__version__ = "0.40.1"
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models.registry import ModelRegistry
print("LLaDAModelLM" in ModelRegistry.get_supported_archs())
"""
    assert run_program(program, tmp_path) == "False"


def test_versions_agree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    version = config["metadata"]["version"]
    assert vllm_sparsed.__version__ == version
    assert metadata.version("vllm_sparsed") == version
    (required,) = [
        line for line in config["options.extras_require"]["cuda"].split() if line.startswith("vllm")
    ]
    first, last = plugin.SUPPORTED_VLLM[0], plugin.SUPPORTED_VLLM[-1]
    major, minor = map(int, last.split("."))
    assert required == f"vllm>={first},<{major}.{minor + 1}"
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
