"Every protocol of the paper, end to end on generated data in the official layouts; and what a protocol refuses."
import json, shutil, subprocess
from pathlib import Path

import numpy as np, pytest, torch
from penaltyanon.cli import plan_protocol
from penaltyanon.evaluate import attacks, protocols as pr
from penaltyanon.core.checkpoints import RunContext
from penaltyanon.nets.anonymizers import Identity
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.core.settings import resolve
from penaltyanon.data.records import Collection
from penaltyanon.data.sources import open_data
from penaltyanon.data.layouts import write_layouts
from penaltyanon.sweep.grid import expand_grid
from conftest import BIN

ATTACKS = {a.name: a for p in pr.PROTOCOLS.values() for a in p.attacks}
PRETRAINED = {n for n, a in ATTACKS.items() if a.weights}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_layouts(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def anonymized(root):
    "One set of anonymized data serves all attacks, as in a sweep."
    data = pr.protocol_data("official", root)
    s = resolve("smoke", precision="fp32", bootstrap=20, action_data=data["ucf101"], privacy_data=data["vispr1"])
    return attacks.AnonymizedCache(Identity(), data, RunContext(s, torch.device("cpu"), progress=False))


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - PRETRAINED))
def test_every_attack_runs_in_the_official_layouts(name, anonymized):
    found, (scores, labels, names) = attacks.run_attack(ATTACKS[name], anonymized)
    assert len(scores) == len(labels) == len(names) == len(set(names)) == found["n"] > 0
    value, floor = (found["top1"], found["chance"]) if ATTACKS[name].kind == "action" else (found["cmap"], found["base_rate"])
    assert 0 <= value <= 100 and 0 < floor <= 100 and found["ci"][0] <= found["ci"][1]
    assert np.isfinite(np.asarray(scores, float)).all()


@pytest.mark.parametrize("name", sorted(PRETRAINED))
def test_pretrained_attackers_need_their_file_and_say_so(name, anonymized, monkeypatch, tmp_path):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as e: attacks.run_attack(ATTACKS[name], anonymized)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize("name", pr.PROTOCOLS)
def test_every_protocol_finds_its_data_in_the_official_layouts(name, anonymized):
    p = pr.PROTOCOLS[name]
    assert anonymized.collection(p.action).kind == "clips" and anonymized.collection(p.privacy).kind == "frames"
    for a in p.attacks:
        assert anonymized.collection(a.train).train and anonymized.collection(a.on or a.train).test


def files(records): return {r.path.resolve() for r in records}


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("name", pr.PROTOCOLS)
def test_nobody_has_learned_from_what_a_row_is_tested_on(name, split, root):
    "f_A, f_T and f_B of the training, and the network that is tested: none has met a record of its test."
    p, data = pr.PROTOCOLS[name], pr.protocol_data("official", root)
    opened = lambda which: open_data(data[which], split)
    anonymizer = files(opened(p.action).train) | files(opened(p.privacy).train)
    pairs = {(p.action, p.action), (p.privacy, p.privacy), *((a.train, a.tested_on) for a in p.attacks)}
    for learned, tested in pairs:
        test = files(opened(tested).test)
        assert test and not test & anonymizer, f"{name}: the anonymizer was trained on {tested}'s test"
        assert not test & files(opened(learned).train), f"{name}: {learned} was trained on {tested}'s test"


@pytest.mark.parametrize("split", [1, 2, 3])
def test_the_layouts_would_show_the_leak(split, root):
    "HMDB51's training part holds clips of PA-HMDB51 in every split; without them it is what PA-HMDB51's row trains on."
    data = pr.protocol_data("official", root)
    hmdb, pa = (open_data(data[name], split) for name in ("hmdb51", "pa-hmdb51"))
    assert files(hmdb.train) & files(pa.test) and files(pa.train) == files(hmdb.train) - files(pa.test)
    assert pr.PROTOCOLS["table1-pahmdb51"].action == "pa-hmdb51"


def test_attributes_that_no_training_clip_has_are_not_attacked(root, tmp_path):
    "PA-HMDB51 without VP-HMDB51's labels: there is nothing to learn frames' attributes from."
    shutil.copytree(root/"hmdb51", tmp_path/"hmdb51", ignore=shutil.ignore_patterns("*.pickle"))
    s = resolve("smoke", precision="fp32", bootstrap=20)
    data = {"pa-hmdb51": f"pa-hmdb51:{tmp_path}/hmdb51"}
    attack = pr.Attack("frames", "privacy", "pa-hmdb51")
    with pytest.raises(UserError, match="no test record has a known attribute|cannot be measured"):
        attacks.run_attack(attack, attacks.AnonymizedCache(Identity(), data, RunContext(s, torch.device("cpu"), progress=False)))


def test_raw_data_reach_only_the_attackers_training(anonymized):
    class Grey(torch.nn.Module):
        def forward(self, x): return torch.full_like(x, 0.5)
    r = attacks.AnonymizedCache(Grey(), anonymized.data, anonymized.context)
    assert r.part("vispr1", True, False, raw=True).x.float().std() > 1
    assert r.part("vispr1", False, False).x.float().std() < 1
    found, _ = attacks.run_attack(ATTACKS["raw-attacker"], r)
    assert found["cmap"] == pytest.approx(found["base_rate"], abs=1e-6)   # a constant picture ranks nobody: precision = base rate


def collection(name, classes=("a", "b"), attributes=("x",)):
    return Collection(name, "clips", (), (), classes, attributes, (), None)


def test_sets_that_do_not_fit_together_are_refused():
    with pytest.raises(UsageError, match="no attribute in common"): attacks.shared_attributes(collection("one"), collection("two", attributes=("y",)))
    with pytest.raises(UsageError, match="other classes"): attacks.check_same_classes(collection("one"), collection("two", classes=("b", "a")))
    assert attacks.shared_attributes(collection("one", attributes=("p", "q", "r")), collection("two", attributes=("r", "p"))) == (("p", "r"), [0, 2], [1, 0])


def test_a_sweep_runs_a_protocol_and_never_redoes_it(root, tmp_path):
    command = [BIN/"penaltyanon", "sweep", "--preset", "smoke", "--protocol", "table2-ucf101", "--layout", "official", "--data", root, "--methods", "penalty",
               "--B", "0.3", "--backbone", "unet", "--set", "decoder=[16]", "--tests", "novel-action", "pahmdb-privacy", "--out", tmp_path/"runs"]
    first = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert first.returncode == 0, first.stderr
    run, = [RunFolder.open(d.parent) for d in (tmp_path/"runs").rglob("DONE")]
    found = {t.stem: json.loads(t.read_text()) for t in (run/"tests").glob("*.json")}
    assert set(found) == {"novel-action", "pahmdb-privacy"} and all(f["B"] == 0.3 and f["method"] == "penalty" for f in found.values())
    assert found["pahmdb-privacy"]["train"] == "vispr-pa" and found["pahmdb-privacy"]["on"] == "pa-hmdb51"
    assert set(np.load(run/"predictions.npz")) >= {"utility_scores", "images_labels"}
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "already done" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in run.path.rglob("*") if p.is_file()}
    later = subprocess.run([str(BIN/"penaltyanon"), "attack", str(tmp_path/"runs"), "--protocol", "table6-pretrained-attacker", "--world", "official", "--data", str(root),
                            "--tests", "raw-attacker"], capture_output=True, text=True, timeout=300)
    assert later.returncode == 0, later.stderr
    assert {t.stem for t in (run/"tests").glob("*.json")} == {"novel-action", "pahmdb-privacy", "raw-attacker"}


def test_figure_3_sweeps_from_no_change_to_complete_anonymization():
    "The protocol's bounds, unless the user names others."
    overrides, _ = plan_protocol("figure3-bounds", "demo", "", Path("data"), [], [])
    assert [s.B for s in expand_grid("demo", **overrides | dict(methods=("penalty",)))] == [0, 0.3, 0.5, 0.7, 0.9, 1]


def finished_run(root, **settings):
    "A run folder that says it is finished."
    run = RunFolder.create(root, resolve("smoke", method="raw", **settings))
    run.finish({})
    return run.path.name


def attack(*words): return subprocess.run([str(BIN/"penaltyanon"), "attack", *map(str, words)], capture_output=True, text=True, timeout=300)


def said(r): return r.stderr.strip().splitlines()[-1]      # above it, the bars of the index


def test_only_the_runs_that_a_protocol_is_for_are_attacked(root, tmp_path):
    "The others are named; where there is no other, that is an error and nothing is written."
    other = finished_run(tmp_path/"runs", action_data=f"hmdb51:{root}/hmdb51", privacy_data=f"vispr1:{root}/vispr")
    words = [tmp_path/"runs", "--protocol", "table6-pretrained-attacker", "--layout", "official", "--data", root, "--tests", "raw-attacker"]
    r = attack(*words)
    assert r.returncode == 1 and r.stderr.splitlines()[0].startswith(f"skipped: {other} was trained on hmdb51:") and "no run was trained on ucf101:" in said(r)
    assert not list((tmp_path/"runs").rglob("tests"))
    mine = finished_run(tmp_path/"runs", action_data=f"ucf101:{root}/ucf101", privacy_data=f"vispr1:{root}/vispr")
    (tmp_path/"runs"/mine).rename(tmp_path/"runs/as-it-was-called")     # by a version with other names
    r = attack(*words)
    assert r.returncode == 0 and f"skipped: {other}" in r.stderr and (tmp_path/"runs/as-it-was-called/tests/raw-attacker.json").is_file(), r.stderr
    assert not (tmp_path/"runs"/other/"tests").exists() and not (tmp_path/"runs"/mine).exists()


def test_what_attacks_lack_is_said_before_anything_starts(root, tmp_path, monkeypatch):
    "Data and weights, all at once, in one line."
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"none")); monkeypatch.setenv("TORCH_HOME", str(tmp_path/"none"))
    run = finished_run(tmp_path/"runs", action_data=f"ucf101:{root}/ucf101", privacy_data=f"vispr1:{root}/vispr")
    common = ["--layout", "official", "--data", root]
    r = attack(tmp_path/"runs", "--protocol", "table2-ucf101", *common, "--data-set", f"hmdb51=hmdb51:{tmp_path}/nowhere", f"vispr2=vispr2:{tmp_path}/neither")
    assert r.returncode == 1 and "/nowhere: no such data folder" in said(r) and "/neither: no such data folder" in said(r)
    r = attack(tmp_path/"runs", "--protocol", "table8-attackers-imagenet", *common, "--tests", "privacy-resnet18-imagenet", "privacy-resnet34-imagenet")
    assert r.returncode == 1 and "resnet18-" in said(r) and "resnet34-" in said(r)
    assert not (tmp_path/"runs"/run/"tests").exists()


@pytest.mark.parametrize("words, says", [
    (["--protocol", "table2"], "did you mean table2-ucf101?"), (["--protocol", "table7-attackers", "--tests", "novel-action"], "has no such test"),
    (["--protocol", "table2-ucf101", "--layout", "moon"], "no such data layout"), (["--protocol", "table1-ucf101", "--data-set", "hmdb51"], "write NAME=LOADER:FOLDER"),
    (["--protocol", "table2-ucf101", "--world", "mini"], "say where it lies")])
def test_what_a_protocol_cannot_be_is_one_line_and_exit_code_2(words, says, tmp_path):
    r = subprocess.run([str(BIN/"penaltyanon"), "sweep", "--preset", "smoke", "--out", str(tmp_path/"runs"), *words], capture_output=True, text=True, timeout=300)
    assert r.returncode == 2 and says in r.stderr and len(r.stderr.strip().splitlines()) == 1 and not (tmp_path/"runs").exists()
