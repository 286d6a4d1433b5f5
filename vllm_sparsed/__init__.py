"""Serve masked-diffusion language models in vLLM with SparseD sparse attention (arXiv 2509.24014).

Importing this package loads neither torch nor vLLM; vLLM finds the plugin through the entry point
``vllm_sparsed.plugin:register``.
"""

from typing import Final

__version__: Final = "0.1.0"
