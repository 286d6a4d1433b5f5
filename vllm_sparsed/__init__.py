"""Serve masked-diffusion language models in vLLM with SparseD sparse attention (arXiv 2509.24014).

Importing this package loads neither torch nor vLLM; vLLM finds the plugin through the entry point
``vllm_sparsed.plugin:register``.
"""

from pathlib import Path
from typing import Final

__version__: Final = "0.1.0"

# In a copy of the sources that lost the link vllm_sparsed/kernels, find the folder it pointed to.
_root = Path(__file__).resolve().parent.parent
if (
    not (_root / "vllm_sparsed" / "kernels").is_dir()
    and (_root / "kernels" / "block_sparse_attention" / "__init__.py").is_file()
):
    __path__.append(str(_root))
del _root
