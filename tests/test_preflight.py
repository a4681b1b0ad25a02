"What a sweep needs is looked up before its first step: all that is missing is said at once, and nothing is begun."
import re, shlex
from dataclasses import replace
from pathlib import Path
import pytest
from penaltyanon import cli
from penaltyanon.core.files import UserError
from penaltyanon.core.settings import resolve
from penaltyanon.evaluate.store import store_bytes
from penaltyanon.sweep import cluster, grid, jobs, preflight
from conftest import ROOT, SHARED


def said(capsys, line, code):
    "What a command prints, after it ended with this code."
    with pytest.raises(SystemExit) as e: cli.main(shlex.split(line))
    out = capsys.readouterr()
    assert (e.value.code or 0) == code, out.err
    return out


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path


def test_a_dry_run_says_runs_hours_disk_and_memory_and_begins_nothing(lab, capsys):
    out = said(capsys, "sweep --preset smoke --B 0.3 --seeds 0 1 --dry-run --out runs/x", 0).out
    table, runs = out.split("to do ")[0], re.findall(r"^to do (\S+)$", out, re.M)
    assert "8: 0 done, 8 to do, 4 to train from 2 starts" in table and len(runs) == 8
    for word in ("will be generated", "the CPU computes", "anonymized data", "(measured)", "one after the other", "for a start", "measured on cpu"): assert word in " ".join(table.split()), word
    assert max(map(len, table.splitlines())) <= 100 and not list(lab.iterdir()), "nothing was begun"


def test_runs_that_are_done_are_not_counted_again(lab, capsys):
    cells = grid.expand_grid("smoke", methods=("raw", "penalty"), B=(0.3, 0.7))
    for s in cells[:2]:
        job = jobs.Job(s, lab/"runs")
        job.path.mkdir(parents=True); (job.path/"DONE").touch()
    out = said(capsys, "sweep --preset smoke --methods raw penalty --B 0.3 0.7 --dry-run --out runs", 0).out
    assert "3: 2 done, 1 to do, 1 to train from 1 starts" in out and len(re.findall(r"^done  \S+$", out, re.M)) == 2


LOST = "--preset paper --protocol table8-attackers-imagenet --data nowhere --methods penalty --B 0.3 --seeds 0"

def test_everything_that_is_missing_is_said_before_anything_starts(lab, capsys, monkeypatch):
    "Data of the run, weights of the run: three lines of a dry run, one line of a real one; exit code 1 both times."
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(lab/"weights"))
    from penaltyanon.nets import recognizers
    monkeypatch.setattr(recognizers, "fetch_weights", lambda url: (_ for _ in ()).throw(UserError(f"{url.rsplit('/', 1)[-1]}: cannot be downloaded")))
    out = said(capsys, f"sweep {LOST} --out runs --dry-run", 1).out
    lines = re.findall(r"^missing: (.*)$", out, re.M)
    assert [next(word for word in ("ucf101", "vispr", "simclr") if word in line) for line in lines] == ["ucf101", "vispr", "simclr"], lines
    assert "will be fetched" in out, "a dry run downloads nothing"
    err = said(capsys, f"sweep {LOST} --out runs", 1).err
    assert err.startswith("error: ") and err.count("\n") == 1 and not list(lab.iterdir())
    for word in ("things are missing", "nowhere/ucf101", "nowhere/vispr", "simclr", "I3D_8x8_R50", "resnet152", "privacy_weights=none"): assert word in err, word


def test_an_attack_looks_for_its_data_first(lab, capsys):
    s = resolve("smoke", method="raw")
    job = jobs.Job(s, lab/"runs")
    from penaltyanon.core.run_folder import RunFolder
    RunFolder.create(lab/"runs", s).finish({})
    for more in ("", " --dry-run"):
        own = "--data-set ucf101=puppets:data/puppets-smoke vispr1=puppets-images:data/puppets-smoke"     # what the run was trained on
        out = said(capsys, f"attack runs --protocol table2-ucf101 --layout official --data nowhere {own}{more}", 1)
        for name in ("hmdb51", "vispr"): assert f"nowhere/{name}" in out.err + out.out
    assert not (job.path/"tests").exists()


def test_a_full_disk_and_too_little_memory_are_noticed_before(lab, monkeypatch):
    cells = [jobs.Job(s, lab/"runs") for s in grid.expand_grid("smoke", methods=("penalty",), B=(0.3,))]
    monkeypatch.setattr(preflight, "available_memory", lambda: 1e3)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: type("Usage", (), dict(free=10.)))
    with pytest.raises(UserError, match="3 things are missing: .*runs.* are needed for runs, .* are needed for anonymized data, .* lower --jobs"):
        preflight.raise_missing(preflight.look_ahead(cells, jobs.LocalResources(gpus=())).needs)


@pytest.mark.parametrize("methods, values, line", [
    (("penalty",), dict(devices=3, batch_clips=4), "devices=3: batch_clips=4 cannot be shared evenly; take a multiple of 3"),
    (("penalty", "vita"), {}, "method=vita learns from labels of the privacy images")])
def test_what_training_would_refuse_is_refused_before(methods, values, line, lab):
    "A batch that devices cannot share; a second method that needs labels, on videos of which nobody is labelled."
    from penaltyanon.data.puppets import write_puppets
    write_puppets(lab/"p", train=8, test=8, images=(4, 2), size=32, frames=8, progress=False)
    found = preflight.find_sets([jobs.Job(resolve("smoke", action_data=f"puppets:{lab}/p", privacy_data=f"puppets-images:{lab}/p"), lab)])
    unlabelled = replace(found[1], collection=replace(found[1].collection, attribute_names=()))
    todo = [jobs.Job(resolve("smoke", method=m, **values), lab) for m in methods]
    problems = [n.problem for n in preflight.find_all_networks(todo, unlabelled)[1]]
    assert len(problems) == 1 and line in problems[0]


def test_room_for_anonymized_data_is_that_of_the_store(lab):
    "UCF101 and VISPR at 224 pixels, with one view of each training video kept: 71 GB, by the arithmetic that evaluation uses."
    s = resolve("paper", eval_fresh=False)
    counts = (9_537, 3_783), (10_000, 7_934)
    assert preflight.data_bytes(s, *counts) == sum(store_bytes(s, *counts).values()) == 3*224**2*(16*(9_537 + 5*3_783) + 10_000 + 7_934)


def test_the_projection_is_what_the_steps_take_times_their_number():
    s = resolve("paper", epochs=100, batch_clips=8, identity_epochs=100, batch_images=8)
    counts = (9_537, 3_783), (10_000, 7_934)
    hours = preflight.project_hours(s, preflight.Costs(identity=1., minimax=2.), *counts)
    assert hours.start == pytest.approx(100*(10_000//8)/3600) and hours.training == pytest.approx(100*(9_537//8)*2/3600)


@pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason="needs the mini data sets")
def test_real_data_are_opened_by_their_lists_alone(monkeypatch):
    "Nothing is decoded but one file of each set."
    from penaltyanon.data import records
    monkeypatch.setattr(records, "_probe_file", lambda path: pytest.fail(f"{path} is decoded"))
    for spec in (f"ucf101:{SHARED}/ucf101-mini", f"images:{SHARED}/fairface-mini"):
        found = preflight.find_data((spec, 1, ""), "mini")
        assert not found.need.problem and min(found.counts) > 20


# ---- what a scheduler is asked for
@pytest.mark.parametrize("written, minutes", [("240", 240), ("8:00:00", 480), ("1-12:00:00", 2160), ("90:00", 90)])
def test_a_time_in_slurms_words_stays_one(written, minutes):
    "As YAML reads it, 8:00:00 would be the number 28800."
    options = cli.parse_assignments([f"time={written}", "account=0042", "exclusive=true"], "--slurm")
    known = cluster.submitit_options(options)
    assert known["timeout_min"] == minutes and known["slurm_account"] == "0042" and known["slurm_additional_parameters"] == {"exclusive": True}


@pytest.mark.parametrize("line, gpus, cpus", [
    ("", 1, 8), ("--gpus 0", 0, 1), ("--gpus 2", 2, 16), ("--devices 2", 2, 16), ("--slurm gres=gpu:a100:1", 1, 8), ("--slurm cpus_per_task=8 --gpus 0", 0, 8), ("--slurm --cpus-per-task=12", 1, 12)])
def test_a_run_of_the_paper_asks_for_a_gpu_and_cpus_to_feed_it(line, gpus, cpus, monkeypatch, lab, capsys):
    asked = []
    monkeypatch.setattr(cli, "check_needs", lambda todo, resources, dry_run: asked.append(resources))
    monkeypatch.setattr(cluster, "run_on_cluster", lambda *a, **k: [])
    said(capsys, f"sweep --preset paper --cluster slurm --no-wait {line}", 0)
    assert (cluster.count_gpus(asked[0]), cluster.cpus_of_job(asked[0])) == (gpus, cpus)
    s = cluster.fit_to_node(resolve("paper", devices=max(1, gpus)), asked[0])
    assert (s.device, s.workers) == (("cuda", (cpus//gpus - 1)//2) if gpus else ("auto", 0))


SCRIPTS = sorted((ROOT/"examples"/"slurm").glob("*.sbatch"))

@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_commands_of_a_batch_file_are_commands(path, monkeypatch, lab):
    "Each `penaltyanon ...` of an example is understood; the file asks for GPUs, CPUs, memory and a time, and is requeued."
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", text, re.M))
    assert {"cpus-per-task", "mem", "time", "requeue"} <= options.keys() and ("data" in path.stem) != bool({"gres", "gpus", "gpus-per-node"} & options.keys())
    commands = re.findall(r"^penaltyanon (.*?)(?: &)?$", text.replace("\\\n", " "), re.M)
    assert commands
    cells = []
    monkeypatch.setattr(cli, "run_grid", lambda these, *a, **k: cells.extend(these) or [])
    import penaltyanon.data.check as check
    monkeypatch.setattr(check, "check_data", lambda *a: type("Found", (), dict(text="", complete=True)))
    for command in commands:
        with pytest.raises(SystemExit) as e: cli.main(shlex.split(command.replace("$DATA", "/data")))
        assert not e.value.code, command
    if cells: assert {s.device for s in cells} == {"cuda"} and {s.action_data for s in cells} == {"ucf101:/data/ucf101"}
    if "devices" in path.stem: assert {s.devices for s in cells} == {2} and options["gpus"] == "2"


def test_the_docs_name_every_batch_file():
    text = (ROOT/"docs"/"sweeps.md").read_text()
    assert SCRIPTS and all(f"examples/slurm/{p.name}" in text for p in SCRIPTS)
