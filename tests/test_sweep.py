"The sweep: nothing misspelt starts, nothing DONE is redone, what fails is named, what hangs is started again."
import base64, io, re, subprocess, sys, time
from pathlib import Path
import nbformat, numpy as np, pytest
from PIL import Image
from penaltyanon.sweep import grid, jobs, notebooks, status
from conftest import BIN
from penaltyanon.core.files import UsageError, UserError, file_hash, read_json
from penaltyanon.core.run_folder import RunFolder, finished_runs
from penaltyanon.core.settings import resolve, run_name, settings_from


def notebook(path, *sources, tagged=0):
    "A notebook of code cells, one of them the parameters cell."
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    cells[tagged].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)
    return path


def literals(s): return "".join(f"{k} = {0.0 if k == 'B' else v!r}\n" for k, v in grid.run_parameters(s, "").items())


@pytest.fixture
def stage(tmp_path):
    "A stand-in for training: fails at B = 0.9, counts its calls, forgets DONE at B = 0.1."
    return notebook(tmp_path/"stage.ipynb", literals(resolve("smoke")), """
from pathlib import Path
from penaltyanon.core.files import UserError
from penaltyanon.core.run_folder import RunFolder, finished_runs
from penaltyanon.core.settings import run_name, settings_from
s = settings_from(globals())
run = RunFolder(Path(run_root)/run_name(s), s)
with open(run/"calls", "a") as f: f.write("x")
if B == 0.9: raise UserError("B = 0.9 is out of order")
if B != 0.1: run.finish({"B": B, "type": type(B).__name__})""")


def test_run_notebooks_take_what_a_sweep_gives_and_nothing_else():
    for name in jobs.RUN_NOTEBOOKS:
        parameters = grid.run_parameters(resolve("smoke"), "runs/x")
        notebooks.check_parameters(notebooks.find_notebook(name), parameters)
        assert notebooks.notebook_parameters(notebooks.find_notebook(name)).keys() == parameters.keys()
        with pytest.raises(UsageError, match="no parameter 'lambda_'"): notebooks.check_parameters(notebooks.find_notebook(name), parameters | {"lambda_": 1.0})


def test_an_unknown_parameter_stops_the_sweep_before_it_starts(tmp_path):
    poor = notebook(tmp_path/"poor.ipynb", "preset = 'smoke'")
    with pytest.raises(UsageError, match="poor.ipynb has no parameter 'method'"): jobs.run_jobs(grid.expand_grid("smoke"), tmp_path/"runs", notebooks=(poor,))
    assert not (tmp_path/"runs").exists()


@pytest.mark.parametrize("changes", [dict(), dict(B=(float("inf"),)), dict(steps=7, decoder=[16, 8, 8, 8], precision="bf16"), dict(penalty="hinge", lam=(0.1,), units="pixel", B=(0.05,))])
@pytest.mark.parametrize("preset", ["smoke", "demo", "mini", "paper"])
def test_settings_survive_the_way_through_a_parameters_cell(preset, changes):
    for s in grid.expand_grid(preset, **changes):
        p = grid.run_parameters(s, "r")
        back = settings_from(p)
        assert back == s and run_name(back) == run_name(s)
        assert p["show_frames"] == all(d.startswith("puppets") for d in (s.action_data, s.privacy_data))


def test_failures_are_named_finished_runs_are_kept_and_values_arrive_as_numbers(tmp_path, stage):
    cells = grid.expand_grid("smoke", methods=("penalty",), B=(0.1, 0.7, 0.9))
    todo = jobs.run_jobs(cells, tmp_path/"runs", jobs.LocalResources(3), notebooks=(stage,), poll_s=0.1)
    forgot, good, bad = todo
    assert [j.state for j in todo] == ["failed", "done", "failed"]
    assert read_json(good.path/"results.json") == {"B": 0.7, "type": "float"}
    assert "no DONE" in forgot.reason and "stage.ipynb: B = 0.9 is out of order" in bad.reason
    assert (bad.path/"stage.log").exists() and (bad.path/"stage.ipynb").exists() and not (good.path/"stage.log").exists()
    with pytest.raises(UserError, match="2 of 3 runs failed: .*B0.1.*; .*B0.9") as e: jobs.raise_failed(todo)
    assert "\n" not in str(e.value) and e.value.exit_code == 1
    again = jobs.run_jobs(cells[1:2] + cells[1:2], tmp_path/"runs", notebooks=(stage,), poll_s=0.1)
    assert [j.state for j in again] == ["already done"] and (good.path/"calls").read_text() == "x"


@pytest.mark.parametrize("method, first", [("penalty", ["runs/train_anonymizer"]), ("blackening", ["runs/train_anonymizer"]), ("raw", []), ("oracle", [])])
def test_training_is_not_repeated_when_only_the_evaluation_is_missing(tmp_path, monkeypatch, method, first):
    "And what shows nothing and learns nothing goes to its evaluation at once."
    seen = []
    monkeypatch.setattr(jobs, "run_notebook_steps", lambda name, *a, **k: iter(seen.append(name) or ()))
    job = jobs.Job(resolve("smoke", method=method), tmp_path)
    job.path.mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="no DONE"): list(jobs.run_job_steps(job))
        (job.path/"anonymizer.safetensors").touch()
    assert seen == first + ["runs/evaluate", "runs/evaluate"]


def test_a_notebook_that_hangs_at_the_start_is_started_again(tmp_path):
    flag = tmp_path/"flag"
    nb = notebook(tmp_path/"sleepy.ipynb", f"import time; from pathlib import Path; f = Path({str(flag)!r})\nif not f.exists(): f.touch(); time.sleep(600)", "B = 0.3", tagged=1)
    began = time.time()
    notebooks.run_notebook(nb, {}, tmp_path/"out.ipynb", start_s=40)
    assert time.time() - began > 40


def test_a_stopped_sweep_leaves_no_process_behind(tmp_path):
    pid = tmp_path/"pid"
    nb = notebook(tmp_path/"long.ipynb", "B = 0.3", f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    steps = notebooks.run_notebook_steps(nb, {}, tmp_path/"out.ipynb")
    while not pid.exists() or not pid.read_text(): next(steps); time.sleep(0.1)
    steps.close()
    kernel, began = int(pid.read_text()), time.time()
    while Path(f"/proc/{kernel}").exists() and time.time() - began < 10: time.sleep(0.2)
    assert not Path(f"/proc/{kernel}").exists(), "the kernel outlived its sweep"


def test_a_shared_file_is_made_once_by_many(tmp_path):
    code = f"""
import time; from penaltyanon.core.files import atomic_write, make_once
def make(path): open({str(tmp_path/'calls')!r}, "a").write("x"); time.sleep(0.5); atomic_write(path, "weights")
make_once({str(tmp_path/'shared')!r}, make); assert open({str(tmp_path/'shared')!r}).read() == "weights" """
    many = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [p.wait() for p in many] == [0]*4 and (tmp_path/"calls").read_text() == "x"


def test_missing_papermill_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "penaltyanon\[run\]"'): notebooks.run_notebook("runs/evaluate", {}, tmp_path/"x.ipynb")


def test_threads_of_a_job_are_what_was_asked(tmp_path):
    nb = notebook(tmp_path/"threads.ipynb", "B = 0.3", "import os; print(os.environ['OMP_NUM_THREADS'])")
    done = notebooks.run_notebook(nb, {}, tmp_path/"out.ipynb", threads=3)
    assert read_json(done)["cells"][-1]["outputs"][0]["text"] == "3\n"


def test_an_executed_notebook_is_small(tmp_path):
    "Two megabytes of noise are shown; the record holds a small picture of it."
    nb = notebook(tmp_path/"noise.ipynb", "side = 100", "from PIL import Image\nImage.effect_noise((side, side), 80).convert('RGB')")
    done = notebooks.run_notebook(nb, {"side": 1000}, tmp_path/"out.ipynb")
    shown, = [o["data"]["image/png"] for c in read_json(done)["cells"] for o in c["outputs"]]
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (420, 420) and done.stat().st_size < 200_000


@pytest.mark.parametrize("deaths, ends", [(1, "well"), (2, "badly")])
def test_a_kernel_that_dies_at_birth_is_started_again(tmp_path, monkeypatch, deaths, ends):
    "Two kernels that start at the same moment can take the same port; one of them dies."
    started, launch = [], notebooks._start_papermill
    def clash(source, output, parameters, log, threads, more):
        started.append(output)
        if len(started) > deaths: return launch(source, output, parameters, log, threads, more)
        log.write_text("RuntimeError: Kernel died before replying to kernel_info\n")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], start_new_session=True)
    monkeypatch.setattr(notebooks, "_start_papermill", clash)
    book, out = notebook(tmp_path/"book.ipynb", "x = 1", "print(x)"), tmp_path/"out.ipynb"
    if ends == "well": assert notebooks.run_notebook(book, {"x": 2}, out).exists() and len(started) == 2
    else:
        with pytest.raises(UserError, match="Kernel died before replying to kernel_info, 2 times"): notebooks.run_notebook(book, {"x": 2}, out)


# ---- retries, locks, GPUs, cancelling
def planned_steps(plan):
    "Steps that end as planned: one entry for each attempt, None = done"
    def run_steps(job):
        yield
        if (reason := plan.pop(0)): raise UserError(reason)
        (job.path/"DONE").parent.mkdir(parents=True, exist_ok=True); (job.path/"DONE").touch()
    return run_steps


@pytest.mark.parametrize("retries, plan, state, tries", [(0, ["x"], "failed", 1), (1, ["x", None], "done", 2), (2, ["x", "y", "z"], "failed", 3), (5, [None], "done", 1)])
def test_a_failed_job_is_tried_as_often_as_asked(tmp_path, retries, plan, state, tries):
    cell, = grid.expand_grid("smoke", methods=("raw",))
    job, = jobs.run_jobs([cell], tmp_path, notebooks=(), run_steps=planned_steps(plan), retries=retries, poll_s=0.01)
    assert (job.state, job.tries) == (state, tries) and not plan
    assert read_json(jobs.job_file(job))["state"] == state and read_json(jobs.job_file(job))["tries"] == tries


@pytest.mark.parametrize("per_gpu, at_once", [(1, 2), (2, 4), (9, 5)])
def test_each_job_has_a_gpu_of_its_own_or_shares_it_as_asked(tmp_path, per_gpu, at_once):
    at_work, most = [], []
    def run_steps(job):
        gpu, = job.gpus
        assert gpu in ("0", "2") and at_work.count(gpu) < per_gpu
        at_work.append(gpu); most.append(len(at_work))
        assert len(at_work) < 2 or set(at_work) == {"0", "2"}, "one GPU is crowded and the other idle"
        yield; yield
        at_work.remove(gpu)
        job.path.mkdir(parents=True); (job.path/"DONE").touch()
    cells = grid.expand_grid("smoke", methods=("raw",), seeds=range(6))
    assert {j.state for j in jobs.run_jobs(cells, tmp_path, jobs.LocalResources(5, gpus=("0", "2"), per_gpu=per_gpu), notebooks=(), run_steps=run_steps, poll_s=0.01)} == {"done"}
    assert max(most) == at_once


def test_a_run_with_two_devices_sees_two_gpus(tmp_path, monkeypatch):
    "Three GPUs by the environment: a training of two devices takes two at once, what trains nothing takes the third beside it; its processes are told."
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    told, at_work = {}, []
    def run_notebook(name, parameters, output, env, **options):
        told.setdefault(parameters["method"], env["CUDA_VISIBLE_DEVICES"].split(","))
        at_work.append(env["CUDA_VISIBLE_DEVICES"])
        assert len({g for names in at_work for g in names.split(",")}) == sum(len(names.split(",")) for names in at_work), "a GPU is used twice"
        yield; yield
        at_work.remove(env["CUDA_VISIBLE_DEVICES"])
        s = settings_from(parameters)
        if "train" in str(name): return (tmp_path/run_name(s)/"anonymizer.safetensors").touch()
        (tmp_path/run_name(s)).mkdir(exist_ok=True); (tmp_path/run_name(s)/"DONE").touch()
    def run_steps(job):
        job.path.mkdir(exist_ok=True)
        yield from jobs.run_job_steps(job, run_steps=run_notebook)
    cells = grid.expand_grid("smoke", methods=("penalty", "raw"), B=(0.3, 0.5), devices=2)
    todo = jobs.run_jobs(cells, tmp_path, jobs.LocalResources(3), run_steps=run_steps, poll_s=0.01)
    assert [(j.state, j.reason) for j in todo] == [("done", "")]*3
    assert len(told["penalty"]) == 2 and len(told["raw"]) == 1 and {*told["penalty"], *told["raw"]} <= {"4", "5", "6"}


def test_fewer_gpus_than_devices_is_one_line_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    cells = grid.expand_grid("smoke", methods=("penalty",), B=(0.3,), devices=2)
    with pytest.raises(UserError, match=r"devices=2: this sweep has 1 GPU \(4\); take devices=1") as e: jobs.run_jobs(cells, tmp_path/"runs")
    assert "\n" not in str(e.value) and not (tmp_path/"runs").exists()


def test_gpus_are_what_the_environment_says(monkeypatch):
    for said, found in (("0,3", ("0", "3")), ("", ()), ("-1", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
        assert jobs.visible_gpus() == found


def test_a_cancelled_job_stops_and_is_not_tried_again(tmp_path):
    cell, = grid.expand_grid("smoke", methods=("raw",))
    def run_steps(job):
        while True: jobs.job_file(job, ".cancel").touch(); yield
    job, = jobs.run_jobs([cell], tmp_path, notebooks=(), run_steps=run_steps, retries=9, poll_s=0.01)
    assert (job.state, job.reason, job.tries) == ("failed", "cancelled", 1)
    again, = jobs.run_jobs([cell], tmp_path, notebooks=(), run_steps=planned_steps([None]), poll_s=0.01)
    assert again.state == "done", "a new sweep begins without the old note"


def test_a_record_of_an_older_version_is_read(tmp_path):
    "Before 0.3 a job that was finished earlier was called kept."
    cell, = grid.expand_grid("smoke", methods=("raw",))
    run = RunFolder.create(tmp_path, cell)
    run.finish({})
    jobs.write_record(jobs.Job(cell, tmp_path, state="kept"))
    found, = status.find_jobs(tmp_path)
    assert found.state == "done" and jobs.make_jobs([cell], tmp_path, notebooks=())[0].state == jobs.ALREADY_DONE


def test_a_thousandth_of_a_simulated_sweep(tmp_path):
    "Crashes, hangs, preemptions, two sweeps at once, one of them killed: every job is done exactly once. tools/simulate_sweep.py does 1,000."
    from simulate_sweep import simulate
    said = simulate(tmp_path/"runs", 40)
    assert said["done_exactly_once"] == 40 and said["done_twice"] == said["lost"] == 0 and said["exit_codes"] == [0, 0], said
    assert said["sweep_killed"]


def test_what_a_killed_sweep_started_dies_with_it_and_its_runs_are_free(tmp_path):
    "kill -9 of a sweep: papermill and its kernel end, the lock is released, and the notebook's attempt is kept by the next sweep."
    pid = tmp_path/"pid"
    nb = notebook(tmp_path/"stage.ipynb", literals(resolve("smoke")), f"""
import os, time; from pathlib import Path
from penaltyanon.core.run_folder import RunFolder, finished_runs
from penaltyanon.core.settings import settings_from
s = settings_from(globals())
run = RunFolder.create(run_root, s, resume=True)
if not Path({str(pid)!r}).exists():
    Path({str(pid)!r}).write_text(str(os.getpid()))
    time.sleep(600)
run.finish(dict())""")
    code = f"from penaltyanon.sweep import grid, jobs; jobs.run_jobs(grid.expand_grid('smoke', methods=('raw',)), {str(tmp_path/'runs')!r}, notebooks=({str(nb)!r},))"
    first = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (pid.exists() and pid.read_text()) and time.time() < deadline: time.sleep(0.1)
    first.kill(); first.wait()
    job, = jobs.run_jobs(grid.expand_grid("smoke", methods=("raw",)), tmp_path/"runs", notebooks=(nb,))
    assert job.state == "done", job.reason                 # it waited until the old kernel let go of the folder
    assert not Path(f"/proc/{pid.read_text()}").exists() and [p.name for p in (job.path/"attempts").glob("*.ipynb")] == ["stage-1.ipynb"]


# ---- where an obfuscation acts
def toy_detector(path, *box):
    "An ONNX detector that finds one box in every frame, in pixels of its 64 x 64 input."
    import onnx
    info = lambda name, dims: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
    rows = onnx.numpy_helper.from_array(np.array([[[*box, .9, 0]]], np.float32), "rows")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["boxes"], value=rows)], "toy", [info("images", (1, 3, 64, 64))], [info("boxes", None)])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_obfuscations_of_regions_run_and_keep_to_their_rows(tmp_path):
    "In the whole frame, on persons, and where a detector of the user's finds something: three rows, three hashes, three names."
    pytest.importorskip("onnx"); pytest.importorskip("onnxruntime")
    if not hasattr(pytest.importorskip("cv2"), "HOGDescriptor"): pytest.skip("this build of OpenCV has no people detector")
    found = toy_detector(tmp_path/"found.onnx", 0, 0, 32, 64)
    data = [f"--action-data=puppets:{tmp_path}/puppets", f"--privacy-data=puppets-images:{tmp_path}/puppets"]
    methods = ["raw", "blackening", "blackening@people", f"blackening@{found}"]
    out = tmp_path/"runs"
    said = subprocess.run([str(BIN/"penaltyanon"), "sweep", "--preset", "smoke", "--methods", *methods, "--out", str(out), "--jobs", "1", *data], capture_output=True, text=True, timeout=500)
    assert said.returncode == 0, said.stderr
    runs = {r.results["label"]: r for r in finished_runs(out)}
    assert set(runs) == {"raw", "blackening (whole frame)", "blackening (persons)", "blackening (found)"}
    assert [re.sub("-s0-.*", "", runs[label].path.name) for label in sorted(runs)] == ["blackening-found", "blackening-people", "blackening", "raw"]
    assert runs["blackening (found)"].settings.method == f"blackening@{found}#{file_hash(found)[:12]}" and len({r.path.name[-8:] for r in runs.values()}) == 4
    changed = {label: r.results["rms"]["clips"]["std"] for label, r in runs.items()}
    assert changed["raw"] < 1e-5 < changed["blackening (found)"] < changed["blackening (whole frame)"] >= changed["blackening (persons)"]
    from penaltyanon.results.report import load_results, results_table
    from penaltyanon.results.tables import make_table
    assert set(results_table(load_results(out)).index) == {*runs, "chance, base rate"}
    rows = make_table("table1_known", out, repeats=2).rows
    assert rows.loc["blackening (persons)", "paper: UCF101 Top-1"] == "53.13" and rows.loc["blackening (persons)", "UCF101 Top-1 % ↑"] != "—"
    assert set(rows.loc[["blackening (whole frame)", "blackening (found)"], "paper: UCF101 Top-1"]) == {"—"}
    from penaltyanon.evaluate.files import run_anonymizer
    toy_detector(found, 0, 0, 64, 64)
    with pytest.raises(UserError, match="found.onnx: is no longer the detector"): run_anonymizer(runs["blackening (found)"])


def test_regions_that_cannot_be_had_are_one_line_before_anything_starts(tmp_path, monkeypatch):
    for method, why in (("blur-strong@faces", "@people or by @FILE.onnx"), ("raw@people", "where regions follow"), (f"pixelate@{tmp_path}/none.onnx", "no such file")):
        with pytest.raises((UsageError, UserError), match=why): grid.expand_grid("smoke", methods=(method,))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"OpenCV is not installed; install one that has it: pip install 'penaltyanon\[detect\]'"): grid.expand_grid("smoke", methods=("blur-strong@people",))
