"""The README says what the code does."""

import re
from pathlib import Path

from vllm_sparsed.config.parameter_table import parameter_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_parameter_table_is_the_one_that_requests_are_checked_with() -> None:
    assert parameter_table() in README


def test_files_named_in_the_readme_exist() -> None:
    named = re.findall(r"`((?:vllm_sparsed|benchmarks|small_model|examples)/[\w./-]*)`", README)
    assert len(named) >= 5
    for path in named:
        assert (ROOT / path).exists(), path
