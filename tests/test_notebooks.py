"Every notebook runs: the library ones as lessons, the run and figure ones on the smoke preset, one job of them through papermill."
import multiprocessing, os, sys, time, warnings
from pathlib import Path
import pytest
from nbdev.config import get_config
from conftest import DRAWINGS, LIBRARY, ROOT, RUNS
from penaltyanon.sweep import grid, jobs, notebooks
from penaltyanon.core.files import read_json, read_rows, read_yaml
from penaltyanon.core.run_folder import finished_runs

name = lambda p: str(p.relative_to(ROOT))


def lesson(path, log):
    "What nbdev_test does with one notebook, its words in a file."
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1); os.dup2(said, 2)
    multiprocessing.set_start_method(None, force=True)       # as in a fresh interpreter: workers of a DataLoader are not to come from the fork server
    from nbdev.test import test_nb
    sys.exit(not test_nb(path, skip_flags=get_config().tst_flags.split(), do_print=True, basepath=ROOT)[0])


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_notebook(path, processes, tmp_path):
    began = time.monotonic()
    p = processes.Process(target=lesson, args=(path, tmp_path/"log"))
    p.start(); p.join()
    said = (tmp_path/"log").read_text()
    assert p.exitcode == 0 and said.count("Completed") == 1, said[-8000:]
    took = time.monotonic() - began
    if took > 60: warnings.warn(f"{path.name} took {took:.0f} s; the house rule is under 60 s")


@pytest.fixture(scope="session")
def swept(tmp_path_factory, run_job_steps):
    "A sweep on the smoke preset: every control and two values of B, each job the run notebooks and a protocol's attacks; B = 0.7 through papermill."
    lab = tmp_path_factory.mktemp("smoke")
    cells = grid.expand_grid("smoke", B=(0.3, 0.7), action_data=f"puppets:{lab}/data", privacy_data=f"puppets-images:{lab}/data")
    grid.prepare_data(cells[0])
    cells.sort(key=lambda s: s.B != 0.7)                        # the longest way first
    jobs.raise_failed(jobs.run_jobs(cells, lab/"runs", run_steps=lambda job: (jobs.run_job_steps if job.settings.B == 0.7 else run_job_steps)(job), **asked(lab)))
    return lab/"runs"


def asked(lab):
    "An attacker who learned from raw images and from raw frames (Table 6)"
    return dict(protocol="table6-pretrained-attacker", tests=("raw-attacker", "raw-attacker-frames"),
                data={"vispr1": f"puppets-images:{lab}/data", "vp-ucf101": f"puppets:{lab}/data"})


def test_a_sweep_runs_every_run_notebook(swept):
    assert {f"runs/{p.stem}" for p in RUNS} == {*jobs.RUN_NOTEBOOKS, "runs/attack"}
    runs = finished_runs(swept)
    assert {r.results["label"] for r in runs} == {"raw", "oracle", "λ = 0", "B = 0.3", "B = 0.7"}
    for r in runs:
        through_papermill = r.settings.B == 0.7
        assert {"params.yaml", "env.json", "data.json", "metrics.jsonl", "results.json"} <= {p.name for p in r.path.iterdir()}
        assert all((r/f"{Path(n).stem}.ipynb").is_file() == through_papermill for n in jobs.RUN_NOTEBOOKS)
        results = {"raw-attacker.json", "raw-attacker.npz", "raw-attacker-frames.json", "raw-attacker-frames.npz", "metrics.jsonl"}
        assert {t.name for t in (r/"tests").iterdir()} == results | ({"table6-pretrained-attacker.ipynb"} if through_papermill else set())


def test_what_was_asked_is_what_was_done(swept):
    "B = 0.7 in params.yaml, in results.json, in the trainer and in the executed notebook."
    done = next(r for r in finished_runs(swept) if r.settings.B == 0.7)
    assert read_yaml(done/"params.yaml")["B"] == 0.7
    assert done.results["B"] == 0.7 and done.results["trainer"]["B"] == 0.7
    assert "-B0.7-" in done.path.name
    for n in jobs.RUN_NOTEBOOKS: assert read_json(done/f"{Path(n).stem}.ipynb")["metadata"]["papermill"]["parameters"]["B"] == 0.7
    assert {read_json(t)["B"] for t in (done/"tests").glob("*.json")} == {0.7}


def test_the_training_notebook_shows_what_there_is_where_nothing_is_trained(swept, run_notebook_steps, tmp_path):
    "A sweep leaves it out; a reader may open it."
    s = next(r.settings for r in finished_runs(swept) if r.settings.method == "oracle")
    for _ in run_notebook_steps("runs/train_anonymizer", grid.run_parameters(s, tmp_path), tmp_path/"oracle.ipynb"): time.sleep(0.05)
    run, = tmp_path.glob("oracle-*")
    assert (run/"data.json").exists() and not (run/"anonymizer.safetensors").exists() and not read_rows(run/"metrics.jsonl")


def test_a_second_sweep_redoes_nothing(swept):
    before = {p: p.stat().st_mtime_ns for p in swept.rglob("*") if p.is_file()}
    cells = [r.settings for r in finished_runs(swept)]
    assert {j.state for j in jobs.run_jobs(cells, swept, **asked(swept.parent))} == {"already done"}
    assert before == {p: p.stat().st_mtime_ns for p in swept.rglob("*") if p.is_file()}


@pytest.mark.parametrize("drawing", DRAWINGS)
def test_figure_notebook(drawing, swept, tmp_path, run_notebook_steps):
    "Figures are drawn from finished runs alone (test_figures draws those of the report through papermill)."
    path, parameters = DRAWINGS[drawing]
    for _ in run_notebook_steps(path, dict(runs=str(swept), out=str(tmp_path/"out"), **parameters), tmp_path/path.name): time.sleep(0.05)
    drawn = [p for p in (tmp_path/"out").iterdir() if p.stem.startswith(drawing) and p.suffix in (".png", ".html")]
    assert drawn and all(p.stat().st_size > 1000 for p in drawn), "nothing was drawn"


def test_the_story_runs_in_a_kernel(swept, tmp_path):
    "The one figure notebook that no report runs."
    done = notebooks.run_notebook("figures/story", dict(runs=str(swept), out=str(tmp_path/"out")), tmp_path/"story.ipynb")
    assert any("image/png" in o.get("data", {}) for c in read_json(done)["cells"] for o in c.get("outputs", []))
