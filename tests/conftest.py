"Shared by all tests: where the repository is, which notebooks it has, and a copy of it to try things on."
import os, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted(ROOT.glob("nbs/[0-9][0-9]_*.ipynb"))
RUNS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
FIGURES = sorted(ROOT.glob("nbs/figures/*.ipynb"))
SHARED = Path(os.environ.get("PENALTYANON_SHARED") or ROOT.parent/"shared"/"data")    # real clips and weights, where they are
BIN = Path(sys.executable).parent       # nbdev_export and its kind; called as functions they would ignore their arguments
os.environ.setdefault("OMP_NUM_THREADS", "1")


def run(*args, cwd=ROOT, **kwargs):
    "Run a command, show everything it said when it fails."
    r = subprocess.run([str(a) for a in args], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)
    assert r.returncode == 0, f"{' '.join(map(str, args))}: exit code {r.returncode}\n{r.stdout[-8000:]}"
    return r.stdout


def python(*args, **kwargs): return run(sys.executable, *args, **kwargs)


def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def repository_files():
    "What a commit of everything would hold: tracked files and new ones that .gitignore lets through."
    try: names = run("git", "ls-files", "-co", "--exclude-standard").splitlines()
    except (AssertionError, OSError):
        keep = ("nbs", "penaltyanon", "tests", ".github", ".ci")
        names = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.parent == ROOT or p.relative_to(ROOT).parts[0] in keep]
    skip = (".ipynb_checkpoints", "__pycache__")
    return [Path(n) for n in names if (ROOT/n).is_file() and not any(part in skip for part in Path(n).parts)]


def copy_of_the_repository(target):
    "What a fresh clone would have (without runs/, which no test needs)."
    for f in repository_files():
        if f.parts[0] == "runs": continue
        (target/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, target/f)
    return target


LONG = "test_slurm test_notebooks test_resume test_shipped test_wheel test_protocols test_ranks test_sweep test_jupyterlab test_cli test_results test_networks test_figures test_anonymize".split()


def pytest_collection_modifyitems(items):
    "Long files first, so that two workers end at about the same time."
    items.sort(key=lambda i: LONG.index(i.path.stem) if i.path.stem in LONG else len(LONG))


@pytest.fixture
def tree(tmp_path): return copy_of_the_repository(tmp_path/"repo")


@pytest.fixture(scope="module")
def module_tree(tmp_path_factory): return copy_of_the_repository(tmp_path_factory.mktemp("tree"))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    "The index of the data sets goes to a folder of this session, never to the user's home."
    os.environ["PENALTYANON_CACHE"] = str(tmp_path_factory.mktemp("cache"))
