"""The configurations of the public checkpoints load, with the README's tokens.

`published/` holds their keys and values as far as they are known here: the theta of UltraLLaDA and
that of iLLaDA are stand-ins.
"""

import json
import re
from pathlib import Path

import pytest
from vllm.config import ModelConfig

from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.registry import MODELS
from vllm_sparsed.models.special_tokens import set_special_tokens
from vllm_sparsed.plugin import register

FILES = sorted((Path(__file__).parent / "published").glob("*.json"))
CONTEXT = {
    "LLaDAModelLM": 4096,
    "ILLaDAForCausalLM": 8192,
    "LLaDAMoEModelLM": 8192,
    "DreamModel": 131072,
}
LONGER_OR_SHORTER = {"UltraLLaDA": 131072, "LLaDA-MoE-7B-A1B-Base-4k": 4096}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_loads(file: Path, tmp_path: Path) -> None:
    register()
    values = json.loads(file.read_text())
    (tmp_path / "config.json").write_text(file.read_text())
    config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    (architecture,) = values["architectures"]
    entry = MODELS[architecture]
    check_supported(config.hf_config)
    set_special_tokens(config)
    assert config.architecture == architecture
    assert config.hf_config.mask_token_id == entry.mask_token_id
    assert config.hf_config.eos_token_id == entry.eos_token_id
    assert config.get_vocab_size() == entry.vocab_size
    assert config.get_head_size() == 128
    assert config.max_model_len == LONGER_OR_SHORTER.get(file.stem, CONTEXT[architecture])
    rope = config.hf_config.rope_parameters
    assert rope == {"rope_type": "default", "rope_theta": values["rope_theta"]}


def test_the_readme_names_them() -> None:
    """Each by its family's name, without version, size and kind."""
    named = {
        name.strip()
        for entry in MODELS.values()
        for name in re.split(r",| and ", entry.checkpoints)
    }
    for file in FILES:
        family = re.sub(r"-(v0|7B|8B|A1B|Base|Instruct|TD|4k)(?=-|$)", "", file.stem)
        assert any(family.lower() in name.lower() for name in named), family
