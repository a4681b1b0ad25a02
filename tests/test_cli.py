"The command line: one line on stderr for what a user can mend, 2 for usage and 1 for failure, quick to start."
import subprocess, sys
import pytest
from penaltyanon import __version__, cli
from synthetic import fake_run


def call(*args, **kwargs):
    command = [sys.executable, "-m", "penaltyanon.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("written", ["--B 0.3 --B 0.5", "--B 0.3 0.5", "--B 0.3,0.5", "--B=0.3 0.5", "--B 0.3, 0.5"])
def test_lists_can_be_written_in_every_usual_way(written):
    words = cli.repeat_options(["sweep", *written.split(), "--out", "x"])
    assert words == ["sweep", "--B", "0.3", "--B", "0.5", "--out", "x"]


def test_what_is_not_a_list_is_left_alone():
    for line in ("report runs/demo --out a.html", "demo --seeds 3 --jobs 2", "puppets data --train 4", "sweep --B",
                 "sweep --B -1", "--version"):
        assert cli.repeat_options(line.split()) == line.split()
    words = cli.repeat_options("sweep --set a=1 decoder=[1,2] --seeds 0 1".split())
    assert words == "sweep --set a=1 --set decoder=[1,2] --seeds 0 --seeds 1".split()


@pytest.mark.parametrize("line, code, says", [
    ("sweep --B -1", 2, "B: must be at least 0"),
    ("sweep --B nan", 2, "B: must be a number, not NaN"),
    ("sweep --B x", 2, "'--B'"),
    ("sweep --B", 2, "requires an argument"),
    ("sweep --preset demp", 2, "did you mean demo"),
    ("sweep --set stepz=3", 2, "did you mean steps"),
    ("sweep --set steps", 2, "key=value"),
    ("sweep --set B=0.3", 2, "--B"),
    ("sweep --set seed=1", 2, "--seeds"),
    ("sweep --set lr_action=1e-3", 2, "write 1.0e-3"),
    ("sweep --methods vitamin", 2, "lambda0, raw, oracle, penalty, spact, vita"),
    ("sweep --action-data ucf101:/nowhere --methods oracle", 2, "generated data"),
    ("sweep --jobs-per-gpu 2 --cluster slurm", 2, "--jobs-per-gpu: is for --cluster local"),
    ("sweep --slurm partition=gpu", 2, "--slurm: is for --cluster slurm"),
    ("sweep --preset mini --action-data ucf101:/nowhere", 1, "/nowhere"),
    ("sweep --action-data ucf:/nowhere --privacy-data images:/x", 2, "ucf101"),
    ("sweep --preset smoke --set action_model=nobody.py:build", 2, "no such file 'nobody.py'"),
    ("demo --seeds 0", 2, "--seeds"),
    ("dem", 2, "dem"),
    ("report", 2, "runs"),
    ("report /nowhere", 1, "no such folder of runs"),
    ("puppets x --variant c", 2, "give one of a, b"),
    ("puppets x --world c", 2, "give one of a, b")])    # the option's name before 0.3
def test_mistakes_are_one_line(line, code, says, tmp_path):
    r = call(*line.split(), cwd=tmp_path)
    assert r.returncode == code, r.stderr
    assert r.stderr.startswith("error: ") and r.stderr.count("\n") == 1 and says in r.stderr, r.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("option", ["--layout", "--world"])
def test_a_protocols_data_layout_has_its_old_name_as_well(option, monkeypatch, tmp_path):
    cells = []
    monkeypatch.setattr(cli, "run_grid", lambda these, *a, **k: cells.extend(these) or [])
    line = f"sweep --preset smoke --protocol table2-ucf101 {option} puppets --data d --methods raw"
    with pytest.raises(SystemExit) as e: cli.main([*line.split(), "--out", str(tmp_path/"runs")])
    assert not e.value.code and [c.action_data for c in cells] == ["puppets:d/puppets"]


def test_help_and_version_start_quickly():
    assert call("--version").stdout == f"{__version__}\n"
    slow = "('torch', 'matplotlib', 'pandas', 'papermill', 'yaml')"
    code = f"import sys, penaltyanon.cli; print([m for m in {slow} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    for command in ("demo", "sweep", "report", "puppets"): assert command in call("--help").stdout
    assert call().returncode == 2 and "Commands" in call().stderr


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch, capsys):
    def fail(*args, **kwargs): raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime.capi")
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as e: cli.main(["anonymize", "x.mp4"])
    assert e.value.code == 1 and 'pip install "penaltyanon[edge]"' in capsys.readouterr().err
    assert cli.missing_extra("no_such_module") is None


def test_a_failure_inside_a_run_is_named_and_leaves_nothing_finished(tmp_path):
    "A network of the user's that can be built and fails in its first step: only the run itself can find that."
    (tmp_path/"nobody.py").write_text("import torch\nclass Nobody(torch.nn.Linear):\n    def forward(self, x): raise ValueError('nobody is at home')\ndef build(classes): return Nobody(2, classes)")
    line = "sweep --preset smoke --methods penalty --B 0.3 --set action_model=nobody.py:build --jobs 1 --retries 0"
    r = call(*line.split(), "--out", tmp_path/"runs", cwd=tmp_path)
    last = r.stderr.splitlines()[-1]
    assert r.returncode == 1 and "nobody is at home" in last, r.stderr
    assert last.startswith("error: 1 of 1 runs failed: penalty-constraint-B0.3-lam1-s0"), r.stderr
    assert not list((tmp_path/"runs").rglob("DONE"))


def test_demo_reports_what_finished_and_still_fails(tmp_path, monkeypatch, capsys):
    "The jobs themselves are replaced by SYNTHETIC runs, one of which fails."
    from penaltyanon.sweep import grid, jobs
    from penaltyanon.results import report
    asked = []
    def run_jobs(cells, out, resources, **k):
        asked.extend(cells)
        fake_run(out, "raw", 1.0, 0, (90., 80.), "raw")
        todo = [jobs.Job(s, out, state="done") for s in cells]
        todo[-1].state, todo[-1].reason = "failed", "the lights went out"
        return todo
    monkeypatch.setattr(jobs, "run_jobs", run_jobs)
    monkeypatch.setattr(grid, "prepare_data", lambda s: asked.append(s))
    monkeypatch.setattr(report, "write_report", lambda root, **k: root/"report.html")
    with pytest.raises(SystemExit) as e:
        cli.main(["demo", "--out", str(tmp_path/"SYNTHETIC"), "--data", "d", "--B", "0.3", "0.9", "--seeds", "2"])
    said = capsys.readouterr()
    assert e.value.code == 1 and "the lights went out" in said.err and "report.html" in said.out and "raw" in said.out
    assert asked[0].action_data == "puppets:d" and asked[0].privacy_data == "puppets-images:d" and len(asked) == 1 + 2*5


def test_the_demo_of_masked_privacy_passes_its_budgets_on(monkeypatch, capsys, tmp_path):
    from penaltyanon.dp import baselines
    asked = []
    monkeypatch.setattr(baselines, "demonstrate_maskdp", lambda *args: asked.append(args) or "the statement")
    with pytest.raises(SystemExit) as e: cli.main(["demo", "--maskdp", "--epsilon", "0.5", "2", "--seeds", "3", "--out", str(tmp_path)])
    assert e.value.code == 0 and capsys.readouterr().out.strip() == "the statement"
    assert asked == [(tmp_path, [.5, 2.], range(3))]


def test_a_budget_that_cannot_be_is_one_line_and_makes_nothing(capsys, tmp_path):
    with pytest.raises(SystemExit) as e: cli.main(["demo", "--maskdp", "--epsilon", "0", "--out", str(tmp_path/"out")])
    assert e.value.code == 2 and "target_epsilon=0.0: give a number above 0" in capsys.readouterr().err
    assert not (tmp_path/"out").exists()
