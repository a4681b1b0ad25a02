"The command line: one line on stderr for what a user can mend, 2 for usage and 1 for failure, quick to start."
import subprocess, sys
import pytest
from penaltyanon import __version__, cli
from synthetic import fake_run


def call(*args, **kwargs): return subprocess.run([sys.executable, "-m", "penaltyanon.cli", *map(str, args)], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("written", ["--B 0.3 --B 0.5", "--B 0.3 0.5", "--B 0.3,0.5", "--B=0.3 0.5", "--B 0.3, 0.5"])
def test_lists_can_be_written_in_every_usual_way(written):
    assert cli.spread(["sweep", *written.split(), "--out", "x"]) == ["sweep", "--B", "0.3", "--B", "0.5", "--out", "x"]


def test_what_is_not_a_list_is_left_alone():
    for line in ("report runs/demo --out a.html", "demo --seeds 3 --jobs 2", "puppets data --train 4", "sweep --B", "--version"): assert cli.spread(line.split()) == line.split()
    assert cli.spread("sweep --set a=1 decoder=[1,2] --seeds 0 1".split()) == "sweep --set a=1 --set decoder=[1,2] --seeds 0 --seeds 1".split()
    assert cli.spread("sweep --B -1".split()) == ["sweep", "--B", "-1"]


@pytest.mark.parametrize("line, code, says", [
    ("sweep --B -1", 2, "B: must be at least 0"), ("sweep --B nan", 2, "B: must be a number, not NaN"), ("sweep --B x", 2, "'--B'"), ("sweep --B", 2, "requires an argument"),
    ("sweep --preset demp", 2, "did you mean demo"), ("sweep --set stepz=3", 2, "did you mean steps"), ("sweep --set steps", 2, "key=value"), ("sweep --set B=0.3", 2, "--B"), ("sweep --set seed=1", 2, "--seeds"),
    ("sweep --set lr_action=1e-3", 2, "write 1.0e-3"), ("sweep --methods vitamin", 2, "lambda0, raw, oracle, penalty, spact, vita"), ("demo --seeds 0", 2, "--seeds"),
    ("sweep --action-data ucf101:/nowhere --methods oracle", 2, "generated data"), ("dem", 2, "dem"), ("sweep --jobs-per-gpu 2 --cluster slurm", 2, "--jobs-per-gpu: is for --cluster local"), ("report", 2, "runs"),
    ("report /nowhere", 1, "no such folder of runs"), ("sweep --preset mini --action-data ucf101:/nowhere", 1, "/nowhere"), ("sweep --action-data ucf:/nowhere --privacy-data images:/x", 2, "ucf101")])
def test_mistakes_are_one_line(line, code, says, tmp_path):
    r = call(*line.split(), cwd=tmp_path)
    assert r.returncode == code, r.stderr
    assert r.stderr.startswith("error: ") and r.stderr.count("\n") == 1 and says in r.stderr, r.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_help_and_version_start_quickly():
    assert call("--version").stdout == f"{__version__}\n"
    heavy = "import sys, penaltyanon.cli; print([m for m in ('torch', 'matplotlib', 'pandas', 'papermill', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stdout == "[]\n"
    for command in ("demo", "sweep", "report", "puppets"): assert command in call("--help").stdout
    assert call().returncode == 2 and "Commands" in call().stderr


def test_a_failure_inside_a_run_is_named_and_leaves_nothing_finished(tmp_path):
    "Settings that only the run itself can refuse."
    r = call("sweep", "--preset", "smoke", "--methods", "penalty", "--B", "0.3", "--set", "action_model=nobody.py:build", "--jobs", 1, "--retries", 0, "--out", tmp_path/"runs", cwd=tmp_path)
    last = r.stderr.splitlines()[-1]
    assert r.returncode == 1 and last.startswith("error: 1 of 1 runs failed: penalty-constraint-B0.3-lam1-s0") and "nobody.py" in last, r.stderr
    assert not list((tmp_path/"runs").rglob("DONE"))


def test_demo_reports_what_finished_and_still_fails(tmp_path, monkeypatch, capsys):
    "The jobs themselves are replaced by SYNTHETIC runs, one of which fails."
    from penaltyanon.sweep import grid, jobs
    from penaltyanon.results import report
    asked = []
    def run_jobs(cells, out, **k):
        asked.extend(cells)
        fake_run(out, "raw", 1.0, 0, 90., 80., "raw")
        todo = [jobs.Job(s, out, state="done") for s in cells]
        todo[-1].state, todo[-1].reason = "failed", "the lights went out"
        return todo
    monkeypatch.setattr(jobs, "run_jobs", run_jobs)
    monkeypatch.setattr(grid, "prepare_data", lambda s: asked.append(s))
    monkeypatch.setattr(report, "write_report", lambda root, **k: root/"report.html")
    with pytest.raises(SystemExit) as e: cli.main(["demo", "--out", str(tmp_path/"SYNTHETIC"), "--data", "d", "--B", "0.3", "0.9", "--seeds", "2"])
    said = capsys.readouterr()
    assert e.value.code == 1 and "the lights went out" in said.err and "report.html" in said.out and "raw" in said.out
    assert asked[0].action_data == "puppets:d" and asked[0].privacy_data == "puppets-images:d" and len(asked) == 1 + 2*5
