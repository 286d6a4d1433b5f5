"""A request takes the way that docs/development.md says, and no files form a circle."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vllm_sparsed", "kernels", "benchmarks", "small_model", "examples")
PAGE = (ROOT / "docs" / "development.md").read_text()
"""`path.py`, `function`: a step of the walk."""
STEP = re.compile(r"^\d+\. `([\w/.]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", re.MULTILINE)
MOST_ROOMS = 8
