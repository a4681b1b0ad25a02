"README.md is nbs/index.ipynb: converted by nbconvert, its links seen from the root in place of nbs/. Run by `make readme`."
import re
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor

ROOT = Path(__file__).parents[1]


def readme() -> str:
    "The text of README.md."
    exporter = MarkdownExporter()
    exporter.register_preprocessor(RegexRemovePreprocessor(patterns=[r"^#\|\s*hide"]), enabled=True)
    text, _ = exporter.from_filename(str(ROOT/"nbs/index.ipynb"))
    text = re.sub(r"\]\((?!\.\./|\w+:|#)", "](nbs/", text)      # [core/2_settings](core/2_settings.ipynb) -> nbs/00_core.ipynb
    return text.replace("](../", "](").strip() + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme(), encoding="utf-8")
