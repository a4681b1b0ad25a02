"Shared by all tests: where the repository is, which notebooks it has, and a copy of it to try things on."
import functools, multiprocessing, os, shutil, subprocess, sys, time
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).parents[1]
WINGS = ("core", "data", "nets", "avatar", "edge", "train", "dp", "evaluate", "sweep", "results")     # from the ground up
LIBRARY = [nb for wing in WINGS for nb in sorted(ROOT.glob(f"nbs/{wing}/[0-9]_*.ipynb"))]
RUNS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
FIGURES = sorted(ROOT.glob("nbs/figures/*.ipynb"))
TABLES = "table1_known table2_novel table5_recognizers table6_pretrained_attacker table7_attackers table8_attackers_imagenet".split()
DRAWINGS = {p.stem: (p, {}) for p in FIGURES if p.stem not in ("table", "diagrams")} | {t: (ROOT/"nbs/figures/table.ipynb", {"table": t}) for t in TABLES}     # name -> notebook, parameters
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


LONG = "test_slurm test_notebooks test_preflight test_resume test_shipped test_wheel test_protocols test_ranks test_sweep test_jupyterlab test_papermill test_cli test_results test_networks test_figures test_anonymize".split()


def pytest_collection_modifyitems(items):
    "Long files first, so that two workers end at about the same time."
    items.sort(key=lambda i: LONG.index(i.path.stem) if i.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def processes():
    "Processes forked from one that has the libraries already: importing them anew for every notebook took a third of the time."
    from multiprocessing.forkserver import ensure_running
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["matplotlib.pyplot", "nbdev.test", "penaltyanon.evaluate.attacks", "penaltyanon.evaluate.files", "penaltyanon.data.puppets",
                                 "penaltyanon.results.report", "penaltyanon.results.tables", "penaltyanon.sweep.jobs", "penaltyanon.train.trainer"])        # tests/ itself is not on the server's path
    ensure_running()                    # with this environment, not that of the first test that needs it
    return fork


@pytest.fixture(scope="session")
def run_notebook_steps(processes):
    "`notebooks.run_notebook_steps` without papermill: a notebook in a forked process, nothing written but what its cells write."
    from attempts import run_attempt
    from penaltyanon.core.files import UserError
    from penaltyanon.sweep.notebooks import check_parameters, find_notebook
    def run_notebook_steps(name, parameters, output, seconds=600, **how):
        check_parameters(source := find_notebook(name), parameters)
        log = Path(output).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        p, deadline = processes.Process(target=run_attempt, args=([source], parameters, log)), time.monotonic() + seconds
        p.start()
        try:
            while p.is_alive() and time.monotonic() < deadline: yield
        finally: p.kill() if p.is_alive() else None; p.join()
        if p.exitcode: raise UserError(f"{name}: exit code {p.exitcode}; {log.read_text()[-4000:]}")
        log.unlink()
    return run_notebook_steps


@pytest.fixture(scope="session")
def run_job_steps(run_notebook_steps):
    "`jobs.run_job_steps` without papermill."
    from penaltyanon.sweep import jobs
    return functools.partial(jobs.run_job_steps, run_steps=run_notebook_steps)


@pytest.fixture(scope="session")
def start_attempt(processes):
    "Starts an attempt at a run, in a forked process."
    from attempts import run_attempt
    from penaltyanon.sweep import grid, jobs, notebooks
    def start_attempt(s, root, log, die_at=None):
        p = processes.Process(target=run_attempt, args=([notebooks.find_notebook(n) for n in jobs.RUN_NOTEBOOKS], grid.run_parameters(s, root), log, die_at))
        p.start()
        return p
    return start_attempt


@pytest.fixture(scope="session")
def finish_attempt(start_attempt):
    "Such an attempt, to its end."
    def finish_attempt(s, root, log):
        p = start_attempt(s, root, log); p.join()
        assert p.exitcode == 0, Path(log).read_text()[-2000:]
    return finish_attempt


@pytest.fixture
def tree(tmp_path): return copy_of_the_repository(tmp_path/"repo")


@pytest.fixture(scope="module")
def module_tree(tmp_path_factory): return copy_of_the_repository(tmp_path_factory.mktemp("tree"))


@pytest.fixture(autouse=True)
def complete_inputs(monkeypatch):
    "What a test has just made is complete: nobody waits for its writer."
    module = sys.modules.get("penaltyanon.edge.anonymize")
    if module: monkeypatch.setattr(module, "SETTLED", 0.0)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    "The index of the data sets goes to a folder of this session, never to the user's home."
    os.environ["PENALTYANON_CACHE"] = str(tmp_path_factory.mktemp("cache"))
