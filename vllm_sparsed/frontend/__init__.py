"""What the API server does for diffusion models beside vLLM's own routes."""

from typing import Final

RENDERER_MODE: Final = "masked_diffusion"
"""Name, among vLLM's tokenizer modes, of the usual tokenizer with our checks of prompts."""
