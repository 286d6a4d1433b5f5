"""Dream's tokenizer, without the remote code that its checkpoints ask for."""

from transformers import AutoTokenizer, Qwen2Tokenizer

from vllm_sparsed.models.checkpoint_config import DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's byte-level BPE under the class name that Dream's tokenizer_config.json gives."""


def register_tokenizers() -> None:
    """Make AutoTokenizer load Dream's tokenizer in spite of its auto_map. May be repeated."""
    AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
