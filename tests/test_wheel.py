"The wheel, built from the source distribution and installed into an empty environment, works without the tools we write with."
import shutil
import pytest
from conftest import FIGURES, ROOT, RUNS, python, run


@pytest.fixture(scope="module")
def dist(tmp_path_factory, module_tree):
    "A wheel made from the source distribution, so both are tested."
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", out, module_tree)
    return out


@pytest.fixture(scope="module")
def empty(tmp_path_factory, dist):
    "The interpreter of a new environment that holds the wheel and what it asks for."
    venv = tmp_path_factory.mktemp("empty")/"venv"
    python("-m", "venv", venv)
    run(venv/"bin/python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT/"constraints.txt", *dist.glob("*.whl"))
    yield venv/"bin/python"
    shutil.rmtree(venv)     # 6 GB


def inside(python, code, cwd): return run(python, "-I", "-c", code, cwd=cwd).strip().split("\n")[-1]


def test_the_wheel_installs_into_an_empty_environment(empty, tmp_path):
    where = inside(empty, "import penaltyanon; print(penaltyanon.__file__, penaltyanon.__version__)", tmp_path)
    assert str(empty.parents[1]) in where and where.endswith(" 0.1.0")
    run(empty, "-m", "pip", "check")


def test_the_tools_we_write_with_are_not_needed(empty, tmp_path):
    tools = ("nbdev", "papermill", "jupyterlab", "fastcore", "execnb", "IPython")
    code = f"import importlib.util as u; print([t for t in {tools} if u.find_spec(t)])"
    assert inside(empty, code, tmp_path) == "[]"


@pytest.mark.parametrize("module", sorted(p.stem for p in ROOT.glob("penaltyanon/*.py") if not p.stem.startswith("_")))
def test_every_module_imports(empty, module, tmp_path):
    inside(empty, f"import penaltyanon.{module}", tmp_path)


def test_the_command_line_answers(empty, tmp_path):
    said = run(empty.parent/"penaltyanon", "--help", cwd=tmp_path)
    assert all(command in said for command in ("demo", "sweep", "report"))


def test_the_notebooks_of_a_run_are_in_the_wheel(empty, tmp_path):
    code = "import penaltyanon, pathlib; print(sorted(p.stem for p in (pathlib.Path(penaltyanon.__file__).parent/'nbs').rglob('*.ipynb')))"
    assert inside(empty, code, tmp_path) == str(sorted(p.stem for p in [*RUNS, *FIGURES]))
