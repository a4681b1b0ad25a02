"The repository itself: nothing to clean or export, the house numbers, the floors, the README, the pins."
import ast, hashlib, os, re, statistics
from configparser import ConfigParser
import nbformat, numpy as np, pytest
from packaging.requirements import Requirement
from readme import readme
from penaltyanon.core.files import read_yaml
from conftest import BIN, FIGURES, LIBRARY, ROOT, RUNS, WINGS, code_cells, python, repository_files, run

EVERY = [*ROOT.glob("nbs/*.ipynb"), *LIBRARY, *RUNS, *FIGURES]
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


# ---- the house numbers of docs/style.md, over the cells that export
def code_lines(source): return [l for l in source.split("\n") if l.strip() and not l.strip().startswith("#")]
def exports(cell): return bool(re.match(r"#\|\s*export", cell.source))


def is_assertion(node):
    if isinstance(node, ast.Assert): return True
    if not isinstance(node, ast.Call): return False
    called = ast.unparse(node.func).split(".")[-1]
    return called in ("expect_fail", "raises") or called.startswith(("test_", "assert_"))


def assertions(cell):
    source = "\n".join(l for l in cell.source.split("\n") if not l.lstrip().startswith(("%", "!")))
    return sum(map(is_assertion, ast.walk(ast.parse(source))))


def house_numbers(path):
    "Median and largest export cell in code lines; assertions and words of prose per 100 exported lines."
    cells = nbformat.read(path, 4).cells
    code = [c for c in cells if c.cell_type == "code"]
    sizes = [n for c in code if exports(c) and (n := len(code_lines(c.source)))]
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    asserted = sum(assertions(c) for c in code if not exports(c))
    return dict(median=statistics.median(sizes), largest=max(sizes), lines=sum(sizes),
                assertions=100*asserted/sum(sizes), words=100*words/sum(sizes))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_house_numbers(path):
    n = house_numbers(path)
    print(" ".join(f"{k} {v:.0f}" for k, v in n.items()))
    assert n["median"] <= 10 and n["largest"] <= 60, n
    assert n["assertions"] >= 8 and n["words"] >= 150, n


# ---- wings and rooms
ROOMS = {f"{p.parent.name}.{p.stem.partition('_')[2]}": (WINGS.index(p.parent.name), int(p.stem.partition("_")[0])) for p in LIBRARY}


def imported(path):
    "Modules of this package that a module imports, anywhere in it."
    package = ["penaltyanon", *path.relative_to(ROOT/"penaltyanon").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): full = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1] if node.level else []) + ("." if node.level and node.module else "") + (node.module or "")
            full = [base, *(f"{base}.{a.name}" for a in node.names)]
        else: continue
        yield from {m.removeprefix("penaltyanon.") for m in full} & ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_wings_below_and_lower_rooms(room):
    wing, number = ROOMS[room]
    above = [m for m in imported(ROOT/"penaltyanon"/f"{room.replace('.', '/')}.py") if ROOMS[m] >= (wing, number)]
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
    code = "import sys, penaltyanon.edge.command, penaltyanon.edge.export; print([m for m in sys.modules if m == 'torch' or m.startswith('penaltyanon.train')])"
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
def test_readme_is_the_index_notebook():
    assert readme() == (ROOT/"README.md").read_text(), "run make readme"


def test_readme_points_at_files_that_exist():
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", (ROOT/"README.md").read_text())
    missing = [l for l in links if not (ROOT/l).exists()]
    assert links and not missing, missing


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
    kinds = (".safetensors", ".pt", ".pth", ".ckpt", ".avi", ".mp4", ".pkl", ".npz")
    scores = lambda f: f.name == "predictions.npz" or f.parent.name == "tests"      # what attackers said of test records
    bad = [f for f in repository_files() if f.suffix in kinds and f.name != "frames.npz"
           and not (f.parts[0] == "runs" and f.suffix == ".npz" and scores(f))]
    for f in repository_files():
        if f.parts[0] == "runs" and f.suffix == ".npz" and scores(f) and any(a.ndim > 2 for a in np.load(ROOT/f).values()): bad.append(f)   # pictures in disguise
    for f in repository_files():
        if f.stem != "frames" or f.parts[0] != "runs": continue
        params = read_yaml(ROOT/f.parent/"params.yaml")
        if not all(params[k].startswith("puppets") for k in ("action_data", "privacy_data")): bad.append(f)
    assert not bad, f"weights, data or frames of people: {list(map(str, bad))}"
