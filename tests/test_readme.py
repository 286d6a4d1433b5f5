"""README and docs say what the code does, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from vllm_sparsed.config.parameter_table import parameter_table
from vllm_sparsed.models.model_table import served_table, settings_table, unserved_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("benchmarks/**/*.md"))


def text_without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MkDocs name them."""
    headings = re.findall(r"^#+ (.+)$", text_without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_parameter_table_is_the_one_that_requests_are_checked_with() -> None:
    assert parameter_table() in (ROOT / "docs/parameters.md").read_text()


def test_tables_of_models_are_those_of_the_registry() -> None:
    assert served_table() in (ROOT / "README.md").read_text()
    page = (ROOT / "docs/models.md").read_text()
    for table in (served_table(), settings_table(), unserved_table()):
        assert table in page


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES[:2] + sorted(ROOT.glob("docs/*.md")), ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    pattern = r"`((?:vllm_sparsed|benchmarks|small_model|examples|docs)/[\w./-]*)`"
    for path in re.findall(pattern, page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/*.md"):
        assert f": {page.name}" in navigation, page.name
