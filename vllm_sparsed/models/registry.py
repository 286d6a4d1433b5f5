"""The models that are served, a row each, and those known by name; nothing heavy is imported.

The plugin, the configurations, the refusals at start and the tables of README and docs are made
from these rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One architecture that is served.

    Attributes:
        architecture: its name in config.json.
        model_class: `module:Class` of the implementation.
        config_class: class of `checkpoint_config` that reads its config.json.
        model_type: that of the configuration class. config.json may say another's: what decides is
            the architecture.
        checkpoints: the public ones, for the README.
        algorithm: `diffusion_alg` of a request that names none: that of the family's own reference
            code.
        logit_shift: whether row p of the logits predicts position p + 1.
        mask_token_id: token of an undecided position, where neither config.json nor the tokenizer
            says it.
        eos_token_id: end of text, where they do not say it.
        vocab_size: of the published checkpoints; the two ids above hold for this size alone.
        mask_text: the mask in the tokenizer's vocabulary.
        end_of_turn: the token, in words, that ends a turn of a chat without ending the text; empty
            if there is none.
        chat_template: how a turn is written, for the README; the checkpoints bring the template.
        settings: what the family is usually decoded with, for the docs.
        aliases: other class names under which the same layers and tensors circulate.
        fallback_template: file of `chat_templates/` for checkpoints without one; empty: none.
    """

    architecture: str
    model_class: str
    config_class: str
    model_type: str
    checkpoints: str
    algorithm: str
    logit_shift: bool
    mask_token_id: int
    eos_token_id: int
    vocab_size: int
    mask_text: str
    end_of_turn: str
    chat_template: str
    settings: str
    aliases: tuple[str, ...] = ()
    fallback_template: str = ""


@dataclass(frozen=True, slots=True)
class UnservedModel:
    """A model near ours that is refused by name.

    Attributes:
        name: of the family.
        architectures: in config.json.
        model_types: in config.json, if they are its own.
        reason: what it is, and so why it is not served here.
        served_by: what does serve it; empty where nothing is known.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    reason: str
    served_by: str = ""

    @property
    def refusal(self) -> str:
        """One line for the log."""
        elsewhere = f" It is served by {self.served_by}." if self.served_by else ""
        return f"{self.name} is not served by vllm_sparsed: {self.reason}.{elsewhere}"


ENTRIES: Final = (
    ModelEntry(
        architecture="LLaDAModelLM",
        model_class="vllm_sparsed.models.llada:LLaDAModelLM",
        config_class="LLaDAConfig",
        model_type="llada",
        checkpoints="LLaDA-8B Base and Instruct, LLaDA-1.5, UltraLLaDA, d3LLM-LLaDA",
        algorithm="low_confidence",
        logit_shift=False,
        mask_token_id=126336,
        eos_token_id=126081,
        vocab_size=126464,
        mask_text="<|mdm_mask|>",
        end_of_turn="<|eot_id|>",
        chat_template="Llama 3's headers",
        settings="as many steps as canvas tokens, blocks of 32 or 128, temperature 0",
    ),
    ModelEntry(
        architecture="DreamModel",
        model_class="vllm_sparsed.models.dream:DreamModel",
        config_class="DreamConfig",
        model_type="Dream",
        checkpoints="Dream-7B Base and Instruct, Dream-Coder, DiffuCoder, d3LLM-Dream, "
        "d3LLM-Dream-Coder",
        algorithm="origin",
        logit_shift=True,
        mask_token_id=151666,
        eos_token_id=151643,
        vocab_size=152064,
        mask_text="<|mask|>",
        end_of_turn="<|im_end|>",
        chat_template="ChatML",
        settings="as many steps as canvas tokens, `entropy`, temperature 0.2, top_p 0.95",
    ),
)

MODELS: Final[Mapping[str, ModelEntry]] = MappingProxyType(
    {name: entry for entry in ENTRIES for name in (entry.architecture, *entry.aliases)}
)
"""By architecture, under each of its names."""

_BLOCKS: Final = "it decodes block after block, with causal attention between blocks"
_IMAGES: Final = "it reads images"

UNSERVED: Final = (
    UnservedModel(
        "LLaDA-MoE-v2",
        ("LLaDAMoEV2ModelLM", "LLaDAMoEv2ModelLM"),
        ("llada_moe_v2",),
        "it has shared experts, and its configuration is not public",
    ),
    UnservedModel(
        "LLaDA2.x",
        ("LLaDA2MoeModelLM",),
        ("llada2_moe", "llada2_moe_veomni"),
        _BLOCKS,
        "SGLang, dInfer and the vLLM plugin dllm-plugin",
    ),
    UnservedModel(
        "SDAR",
        ("SDARForCausalLM", "SDARMoeForCausalLM"),
        ("sdar", "sdar_moe"),
        _BLOCKS,
        "SGLang and LMDeploy",
    ),
    UnservedModel(
        "Fast-dLLM v2",
        ("Fast_dLLM_QwenForCausalLM",),
        ("Fast_dLLM_Qwen",),
        _BLOCKS,
        "the code of its repository, NVlabs/Fast-dLLM",
    ),
    UnservedModel(
        "Fast-dLLM's LLaDA",
        ("LLaDAFastDLLMModelLM", "LLaDAFastdLLMModelLM"),
        ("llada_fastdllm",),
        "its class keeps keys and values of the prefix between steps",
        "the training library dllm; LLaDA's own checkpoints (LLaDAModelLM) are served here",
    ),
    UnservedModel(
        "LLaDA-V or LaViDa",
        ("LlavaLLaDAModelLM", "LlavaLladaForMaskedDiffusion"),
        ("llava_llada",),
        _IMAGES,
        "the code of its repository",
    ),
    UnservedModel(
        "MMaDA",
        ("MMadaModelLM",),
        ("mmada",),
        f"{_IMAGES} and makes them",
        "the code of its repository, Gen-Verse/MMaDA",
    ),
    UnservedModel(
        "DiffusionGemma",
        ("DiffusionGemmaForBlockDiffusion",),
        (),
        _BLOCKS,
        "vLLM itself, which this plugin leaves as it is",
    ),
    UnservedModel(
        "Sumi", ("SumiForCausalLM",), ("sumi",), "it has no mask token: its noise is any token"
    ),
    UnservedModel(
        "DreamOn",
        (),
        (),
        "its canvas changes its length (it has an expand token)",
        "the code of its repository, DreamLM/DreamOn",
    ),
)

DREAM_ON: Final = UNSERVED[-1]
"""Has Dream's architecture and model type: known by its tokens alone."""


def served_architectures(model_type: str | None = None) -> str:
    """The architectures that are served, with their checkpoints, in words.

    Args:
        model_type: only those whose configuration has it; None: all.
    """
    entries = [entry for entry in ENTRIES if model_type in (None, entry.model_type)]
    return ", ".join(f"{entry.architecture} ({entry.checkpoints})" for entry in entries)


def unserved_model(architectures: Iterable[str], model_type: str | None) -> UnservedModel | None:
    """The row of a model that is known and not served, by what its config.json says."""
    names = set(architectures)
    for model in UNSERVED:
        if names.intersection(model.architectures) or model_type in model.model_types:
            return model
    return None
