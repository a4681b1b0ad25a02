"""Pages that are made: README.md and docs/glossary.md from nbs/index.ipynb, docs/results.md from nbs/pages/results.ipynb, docs/architecture.svg from the imports. Run by `make pages`."""
import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from architecture import draw

ROOT = Path(__file__).parents[1]
GLOSSARY = "glossary"     # tag of the cells of the index that are no part of the README


def convert(notebook: Path, target: Path, keep) -> str:
    "Cells of a notebook for which `keep` holds, as Markdown whose relative links are seen from `target`."
    nb = nbformat.read(notebook, 4)
    nb.cells = [c for c in nb.cells if keep(c)]
    text, _ = MarkdownExporter().from_notebook_node(nb)

    def relink(match):
        "The same file, seen from the page."
        file, hash_, anchor = match[1].partition("#")
        return f"]({os.path.relpath((notebook.parent/file).resolve(), target.parent)}{hash_}{anchor})"
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", relink, text).strip() + "\n"


def is_glossary(cell) -> bool:
    "Does a cell belong to the glossary?"
    return GLOSSARY in cell.metadata.get("tags", [])


def pages() -> dict[Path, str]:
    "Path and text of every page that is made."
    index, results = ROOT/"nbs"/"index.ipynb", ROOT/"nbs"/"pages"/"results.ipynb"
    readme, glossary, report = ROOT/"README.md", ROOT/"docs"/"glossary.md", ROOT/"docs"/"results.md"
    return {readme: convert(index, readme, lambda cell: not is_glossary(cell)),
            glossary: convert(index, glossary, is_glossary),
            report: convert(results, report, lambda cell: True),
            ROOT/"docs"/"architecture.svg": draw()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
