"The repository itself: nothing to clean or export, the house numbers, the floors, the README, the pins."
import ast, hashlib, os, re
from configparser import ConfigParser
from pathlib import Path
import numpy as np, pytest
from packaging.requirements import Requirement
import house
from architecture import imported_modules
from pages import pages
from penaltyanon.core.files import read_yaml
from conftest import BIN, FIGURES, LIBRARY, ROOT, RUNS, WINGS, code_cells, python, repository_files, run

EVERY = [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("nbs/pages/*.ipynb"), *LIBRARY, *RUNS, *FIGURES]
name = lambda p: str(p.relative_to(ROOT))


def digest(tree): return {str(p.relative_to(tree)): hashlib.sha256(p.read_bytes()).hexdigest() for p in tree.rglob("*")
                          if p.is_file() and "__pycache__" not in p.parts}


@pytest.mark.parametrize("command", ["nbdev_clean", "nbdev_export"])
def test_clean_and_export_change_nothing(tree, command):
    before = digest(tree)
    run(BIN/command, cwd=tree)
    after = digest(tree)
    changed = sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))
    assert not changed, f"run nbdev_export and nbdev_clean: they change {changed}"


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_a_run_notebook_has_one_parameters_cell(path):
    tagged = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells carry the tag `parameters`"
    for line in ast.parse(tagged[0].source).body:
        assert isinstance(line, ast.Assign | ast.AnnAssign), f"not a literal: {ast.unparse(line)}"
        ast.literal_eval(line.value)


# ---- the page (docs: CONTRIBUTING.md)
def assertions(source):
    "Assertions in a cell: assert statements, and calls of test_*, assert_*, expect_fail and raises."
    def is_assertion(node):
        if isinstance(node, ast.Assert): return True
        called = ast.unparse(node.func).split(".")[-1] if isinstance(node, ast.Call) else ""
        return called in ("expect_fail", "raises") or called.startswith(("test_", "assert_"))
    return sum(map(is_assertion, ast.walk(ast.parse(source))))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_a_page_is_narrow_and_in_small_cells(path):
    page, cells = house.read_page(path), house.cells_of(path)
    assert page["long"] == page["lesson_long"] == 0, "lines over 120 columns"
    assert max(page["chars"]) <= 2000 and max(page["sizes"]) <= 60, "an export cell is too large; divide it"
    assert max(page["runs"]) <= 4, f"{max(page['runs'])} definitions in a row without a lesson"
    words = sum(len(source.split()) for kind, source in cells if kind == "prose")
    asserted = sum(assertions(source) for kind, source in cells if kind == "lesson")
    assert asserted >= 0.08 * sum(page["sizes"]) and words >= 1.5 * sum(page["sizes"]), (asserted, words, sum(page["sizes"]))


def test_the_pages_together():
    measures = house.measure()
    assert measures["median export cell, characters"] <= 400
    assert measures["definitions followed at once by a lesson, %"] >= 60
    assert measures["public names in two modules"] == 0, {n: m for n, m in house.public_names(ROOT).items() if len(m) > 1}


def packed(tree):
    "Places where much is packed into one statement."
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if any(isinstance(t, ast.Tuple) and len(t.elts) > 3 for t in node.targets): yield node, "assigns more than three names at once"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.IfExp | ast.BoolOp): yield node, "is a condition as a statement"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Lambda): yield node, "calls a lambda where it stands"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_nothing_is_packed_to_look_short(path):
    for kind, source in house.cells_of(path):
        if kind != "export": continue
        bad = [f"line {node.lineno} {what}: {ast.unparse(node)[:80]}" for node, what in packed(ast.parse(source))]
        starts = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
        lines = source.split("\n")
        bad += [f"two statements: {lines[n - 1].strip()[:80]}" for n in set(starts) if starts.count(n) > 1 and "; " in re.sub(r"([\"']).*?\1|#.*", "", lines[n - 1])]
        assert not bad, bad


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_no_function_takes_more_than_seven_parameters(path):
    for kind, source in house.cells_of(path):
        if kind != "export": continue
        for f in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)):
            count = len([a for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs if a.arg not in ("self", "cls")])
            assert count <= 7, f"{f.name} takes {count} parameters"


# ---- wings and rooms
ROOMS = {f"{p.parent.name}.{p.stem.partition('_')[2]}": (WINGS.index(p.parent.name), int(p.stem.partition("_")[0])) for p in LIBRARY}


def imported(source, room):
    "Rooms that a module, or the lessons of its notebook, import, anywhere in them."
    package = ("penaltyanon", *room.split(".")[:-1])
    return {m.removeprefix("penaltyanon.") for m in imported_modules(source, package)} & ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_wings_below_and_lower_rooms(room):
    wing, number = ROOMS[room]
    module, notebook = ROOT/"penaltyanon"/f"{room.replace('.', '/')}.py", ROOT/"nbs"/WINGS[wing]/f"{number}_{room.partition('.')[2]}.ipynb"
    lessons = "\n".join(source for kind, source in house.cells_of(notebook) if kind == "lesson")
    used = {*imported(module.read_text(), room), *imported(lessons, room)}
    above = [m for m in used if ROOMS[m] > (wing, number)]
    assert not above, f"{room} (wing {wing}, room {number}) imports {above}"


def test_rooms_are_numbered_without_gaps_and_named_as_their_modules():
    for wing in range(len(WINGS)): assert sorted(n for w, n in ROOMS.values() if w == wing) == list(range(sum(w == wing for w, _ in ROOMS.values())))
    for path in LIBRARY:
        said = next(m[1] for c in code_cells(path) if (m := re.search(r"#\|\s*default_exp\s+([\w.]+)", c.source)))
        assert said in ROOMS and said == f"{path.parent.name}.{path.stem.partition('_')[2]}", path


def test_every_module_comes_from_a_notebook():
    modules = {".".join(p.relative_to(ROOT/"penaltyanon").with_suffix("").parts) for p in ROOT.glob("penaltyanon/**/*.py")}
    assert {m for m in modules if not m.endswith("__init__")} - ROOMS.keys() == {"_modidx", "cli"}


def test_the_edge_knows_no_torch_and_no_training():
    code = "import sys, penaltyanon.edge.command, penaltyanon.edge.export; from pathlib import Path; [__import__(f'penaltyanon.avatar.{f.stem}') for f in Path(penaltyanon.__path__[0], 'avatar').glob('[a-z]*.py')]; print([m for m in sys.modules if m == 'torch' or m.startswith('penaltyanon.train')])"
    assert python("-c", code).strip() == "[]"


# ---- what must not be in the code
def python_sources():
    for f in repository_files():
        if f.suffix == ".py": yield f, (ROOT/f).read_text()
    for f in EVERY: yield f, "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", c.source, flags=re.M) for c in code_cells(f))


def test_nothing_unpickles_strangers_files():
    for path, source in python_sources():
        for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
            called = ast.unparse(call.func)
            assert called not in ("pickle.load", "pickle.loads"), f"{path}: {ast.unparse(call)}: use a restricted unpickler"
            if called == "torch.load":
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in call.keywords)
                assert safe, f"{path}: {ast.unparse(call)}: say weights_only=True"


# ---- README, pins, the two commands
@pytest.mark.parametrize("page", ["README.md", "docs/glossary.md", "docs/results.md", "docs/architecture.svg"])
def test_made_pages_are_current(page):
    assert pages()[ROOT/page] == (ROOT/page).read_text(encoding="utf-8"), "run make pages"


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT/"README.md").read_text(encoding="utf-8").split()) <= 1400


def links(path):
    "Relative links of a page, or of a notebook's prose."
    text = "\n".join(source for kind, source in house.cells_of(path) if kind == "prose") if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return re.findall(r"\]\((?!\w+:)([^)#\s]+)", text)


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *EVERY], ids=name)
def test_links_lead_to_files_that_exist(path):
    missing = [l for l in links(path) if not (path.parent/l).exists()]
    assert not missing, missing


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *EVERY], ids=name)
def test_nothing_points_outside_the_repository(path):
    outside = [l for l in links(path) if not (path.parent/l).resolve().is_relative_to(ROOT)]
    assert not outside, outside
    if path.suffix == ".ipynb": assert not re.findall(r"\b(?:method|audit|design|truth|house|winning)\.md\b(?!\))", "\n".join(s for _, s in house.cells_of(path)))


def test_pins_are_in_the_ranges():
    cfg = ConfigParser(delimiters=["="]); cfg.read(ROOT/"settings.ini")
    wanted = [l for k in cfg["DEFAULT"] if k.endswith("requirements") for l in cfg["DEFAULT"][k].split("\n")[1:]]
    key = lambda n: re.sub(r"[-_.]+", "-", n).lower()
    pins = dict(l.split("==") for l in (ROOT/"constraints.txt").read_text().split() if "==" in l)
    pins = {key(n): v for n, v in pins.items()}
    for r in map(Requirement, wanted): assert r.specifier.contains(pins[key(r.name)]), f"{r} but constraints.txt has {pins[key(r.name)]}"


def test_ci_runs_the_test_command():
    assert os.access(ROOT/".ci/run", os.X_OK)
    assert (ROOT/".ci/run").read_text().rstrip().split("\n")[-1] == "make test"
    workflow = (ROOT/".github/workflows/ci.yml").read_text()
    assert "run: make test" in workflow
    assert all(re.search(r"@v\d+\.\d+\.\d+$", l) for l in workflow.split("\n") if "uses:" in l), "pin actions to a full version"


def test_no_notebook_tells_where_a_machine_kept_its_files():
    here = re.compile(r"/(?:work|root|home|Users)/[\w.-]+")        # temporary folders may be named
    told = {str(f): found[:3] for f in repository_files() if f.suffix == ".ipynb" and (found := here.findall((ROOT/f).read_text()))}
    assert not told, told


def test_no_weights_no_data_and_no_person_in_the_tree():
    kinds = (".safetensors", ".pt", ".pth", ".ckpt", ".onnx", ".tflite", ".torch", ".avi", ".mp4", ".pkl", ".npz")
    scores = lambda f: f.name == "predictions.npz" or f.parent.name == "tests"      # what attackers said of test records
    body = Path("penaltyanon/avatar/body.npz")                                      # a mesh in the public domain: NOTICE
    assert hashlib.sha256((ROOT/body).read_bytes()).hexdigest().startswith("f0f7365c0bd4"), "not the mesh that NOTICE is about"
    bad = [f for f in repository_files() if f.suffix in kinds and f.name != "frames.npz" and f != body
           and not (f.parts[0] == "runs" and f.suffix == ".npz" and scores(f))]
    for f in repository_files():
        if f.parts[0] == "runs" and f.suffix == ".npz" and scores(f) and any(a.ndim > 2 for a in np.load(ROOT/f).values()): bad.append(f)   # pictures in disguise
    for f in repository_files():
        if f.stem != "frames" or f.parts[0] != "runs": continue
        params = read_yaml(ROOT/f.parent/"params.yaml")
        if not all(params[k].startswith("puppets") for k in ("action_data", "privacy_data")): bad.append(f)
    assert not bad, f"weights, data or frames of people: {list(map(str, bad))}"
