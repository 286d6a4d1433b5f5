"""Takes into the site what the pages link to outside docs/: results, notes, the README."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("README.md", "benchmarks", "small_model", "examples", "llada-*")
SUFFIXES = {".md", ".png", ".svg", ".csv"}


def on_files(files: Files, config: Any) -> Files:
    """Add the files under `repository/`, as they lie in the repository."""
    for place in PLACES:
        for top in ROOT.glob(place):
            for path in [top, *top.rglob("*")]:
                if path.is_file() and path.suffix in SUFFIXES:
                    uri = f"repository/{path.relative_to(ROOT).as_posix()}"
                    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ lead to `repository/`, and those from there back to the pages."""
    if page.file.src_uri.startswith("repository/"):
        return re.sub(r"\]\(docs/", "](../", markdown)
    return re.sub(r"\]\(\.\./", "](repository/", markdown)
