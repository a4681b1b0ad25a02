"""The house in numbers: what the page looks like, how much of it is explained, which names there are. `python tools/house.py [FOLDER]`; tests/test_repo.py holds the limits."""
import ast
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS = 120


def library_notebooks(root: Path) -> list[Path]:
    "The notebooks that export, in wings or, in older commits, in one folder."
    found = [*root.glob("nbs/*/[0-9]_*.ipynb"), *root.glob("nbs/[0-9][0-9]_*.ipynb")]
    return sorted(found)


def cells_of(path: Path) -> list[tuple[str, str]]:
    "Kind (prose, export or lesson) and source of each cell; magics become `pass`."
    out = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            out.append(("prose", source))
        else:
            kind = "export" if re.match(r"#\|\s*export", source) else "lesson"
            out.append((kind, re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)))
    return out


def only_imports(source: str) -> bool:
    "Does a cell hold imports, comments and nothing else?"
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


def definitions(source: str) -> list[str]:
    "Functions and classes that a cell defines at its top."
    return [n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]


def code_lines(source: str) -> list[str]:
    "Lines that are neither empty nor a comment alone."
    return [line for line in source.split("\n") if line.strip() and not line.strip().startswith("#")]


def code_size(source: str) -> int:
    "Characters of the code lines of a cell, without indentation: what the eye must hold."
    return sum(len(line.strip()) for line in code_lines(source))


def read_page(path: Path) -> dict:
    "What one notebook looks like: sizes of its export cells, long lines, and which definitions a lesson follows."
    page = dict(sizes=[], chars=[], long=0, exported=0, lesson_long=0, lesson=0, defs=0, followed=0, introduced=0, runs=[])
    cells, run = cells_of(path), 0
    code = [(kind, source) for kind, source in cells if kind != "prose"]
    for i, (kind, source) in enumerate(code):
        lines = code_lines(source)
        if kind == "lesson":
            page["lesson"] += len(lines)
            page["lesson_long"] += sum(len(line) > COLUMNS for line in lines)
            if not only_imports(source):
                page["runs"] += [run] if run else []
                run = 0
            continue
        page["exported"] += len(lines)
        page["long"] += sum(len(line) > COLUMNS for line in lines)
        if only_imports(source):
            continue
        page["sizes"].append(len(code_lines(source)))
        page["chars"].append(code_size(source))
        names = definitions(source)
        page["defs"] += len(names)
        run += len(names)
        if i + 1 < len(code) and code[i + 1][0] == "lesson":
            page["followed"] += len(names)
    page["runs"] += [run] if run else []
    for before, (kind, source) in zip(cells, cells[1:]):
        if kind == "export" and before[0] == "prose" and not only_imports(source):
            page["introduced"] += len(definitions(source))
    return page


def public_names(root: Path) -> dict[str, list[str]]:
    "Every public function, class and constant, and the modules that define it."
    where = defaultdict(list)
    for path in sorted(root.glob("penaltyanon/**/*.py")):
        module = ".".join(path.relative_to(root/"penaltyanon").with_suffix("").parts)
        if path.stem.startswith("_") or module == "cli":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            else:
                names = []
            for name in names:
                if not name.startswith("_") and module not in where[name]:
                    where[name].append(module)
    return dict(where)


def settings_count(root: Path) -> int:
    "Fields of the dataclasses that make up `Settings`."
    for path in root.glob("penaltyanon/**/*.py"):
        classes = {n.name: n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)}
        if "Settings" in classes:
            bases = [ast.unparse(b) for b in classes["Settings"].bases]
            return sum(isinstance(n, ast.AnnAssign) for b in bases for n in classes[b].body)
    return 0


def glossary_terms(root: Path) -> int:
    "Lines of the glossary, where there is one."
    path = root/"docs"/"glossary.md"
    return len(re.findall(r"^\| \*\*", path.read_text(encoding="utf-8"), re.M)) if path.exists() else 0


def measure(root: Path = ROOT) -> dict:
    "All measures of a checkout."
    pages = [read_page(p) for p in library_notebooks(root)]
    total = {k: sum(p[k] for p in pages) for k in ("long", "exported", "lesson_long", "lesson", "defs", "followed", "introduced")}
    sizes, chars, runs = ([x for p in pages for x in p[k]] for k in ("sizes", "chars", "runs"))
    exported_chars = sum(chars)
    names = public_names(root)
    readme = root/"README.md"
    return {
        "library notebooks": len(pages),
        "median / largest export cell, lines": f"{statistics.median(sizes):g} / {max(sizes)}",
        "median export cell, characters": statistics.median(chars),
        "p90 export cell, characters": sorted(chars)[int(0.9 * len(chars))],
        "largest export cell, characters": max(chars),
        "characters per exported line": round(exported_chars / sum(sizes)),
        "exported lines over 120 columns, %": round(100 * total["long"] / total["exported"], 1),
        "lesson lines over 120 columns, %": round(100 * total["lesson_long"] / total["lesson"], 1),
        "definitions": total["defs"],
        "definitions followed at once by a lesson, %": round(100 * total["followed"] / total["defs"], 1),
        "definitions between two lessons, mean / max": f"{statistics.mean(runs):.1f} / {max(runs)}",
        "definitions introduced by prose, %": round(100 * total["introduced"] / total["defs"], 1),
        "words in the README": len(readme.read_text(encoding="utf-8").split()),
        "public names": len(names),
        "public names in two modules": sum(len(m) > 1 for m in names.values()),
        "settings": settings_count(root),
        "concepts in the glossary": glossary_terms(root),
    }


def main():
    "Print the measures, a line each."
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for name, value in measure(root).items():
        print(f"{name:48} {value}")


if __name__ == "__main__":
    main()
