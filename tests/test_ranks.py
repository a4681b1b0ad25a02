"Two processes that share a batch make the step of one process that has it whole."
import os, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from penaltyanon.sweep import grid
from penaltyanon.train import trainer
from penaltyanon.core.files import UserError
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.core.settings import resolve, start_key
from conftest import ROOT

pytest.importorskip("lightning_fabric", reason="needs lightning-fabric: pip install 'penaltyanon[train]'")


def train(folder, devices, *trainings):
    "What rank_worker.py trains, all of it in one start of its processes."
    out = folder/f"{devices}.pt"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests"), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    for k in ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"): env.pop(k, None)
    r = subprocess.run([sys.executable, str(Path(__file__).parent/"rank_worker.py"), str(devices), str(out), *trainings], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Each training by one process that has the whole batch, and by two that share it."
    folder = tmp_path_factory.mktemp("trained")
    return train(folder, 1, "penalty", "vita"), train(folder, 2, "penalty", "vita", "penalty-alone")


def off(a, b): return float((a - b).norm()/b.norm())


@pytest.mark.parametrize("method", ["penalty", "vita"])
def test_gradients_and_training_are_those_of_the_whole_batch(trained, method):
    "The first step's gradients of all three networks, and what a short training logs: NT-Xent with a bound, and supervised labels."
    one, two = (trainings[method] for trainings in trained)
    for net in ("f_A", "f_T", "f_B"):
        assert off(two["grads"][net], one["grads"][net]) < 1e-4, (net, off(two["grads"][net], one["grads"][net]))
    assert len(two["rows"]) == len(one["rows"]) == 4
    for step, close in ((0, 1e-4), (3, 2e-2)):       # Adam's first steps are signs: rounding of a gradient near zero moves a weight by a whole step, the losses hardly
        for key in ("loss_action", "loss_privacy", "rms_clips", "rms_images"): assert two["rows"][step][key] == pytest.approx(one["rows"][step][key], rel=close), (step, key)
    assert two["lam"] == pytest.approx(one["lam"], rel=2e-2)


def test_without_the_others_negatives_it_is_another_loss(trained):
    "What the comparison above would catch: each process with its own images only."
    one, wrong = trained[0]["penalty"], trained[1]["penalty-alone"]
    assert off(wrong["grads"]["f_B"], one["grads"]["f_B"]) > 0.05


# ---- a whole run in two processes
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    s = resolve("smoke", devices=2, steps=9, save_minutes=0.0, precision="fp32", backbone="unet", decoder=(16,), action_data=f"puppets:{lab}/data", privacy_data=f"puppets-images:{lab}/data")
    grid.prepare_data(s)
    return lab, s


def timeless(rows): return [{k: v for k, v in r.items() if k != "ms"} for r in rows]


def test_a_run_on_two_devices_and_killed_midway(lab, monkeypatch):
    "One file of rows, one anonymizer; killed in minimax training, with all its processes, and started again it ends as the one that was not. The first is inside a SLURM job of one task."
    lab, s = lab
    for name, value in dict(SLURM_JOB_ID="17", SLURM_JOB_NAME="penaltyanon", SLURM_NTASKS="1", SLURM_NTASKS_PER_NODE="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NNODES="1").items(): monkeypatch.setenv(name, value)
    straight = RunFolder.create(lab/"straight", s)
    f_A, record = trainer.train_on_devices(straight, show=lambda line: None)
    rows = straight.metrics()
    assert [r["step"] for r in rows if r["stage"] == "minimax"] == list(range(1, 10)) and record["steps"] == 9
    killed = RunFolder.create(lab/"killed", s)
    code = f"from penaltyanon.train import trainer; from penaltyanon.core.run_folder import RunFolder; trainer.train_on_devices(RunFolder.open({str(killed.path)!r}))"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    deadline = time.time() + 240
    while not any(r["stage"] == "minimax" and r["step"] >= 3 for r in killed.metrics()):
        assert p.poll() is None and time.time() < deadline
        time.sleep(0.05)
    started = at_work(killed.path)
    p.kill(); p.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in started) and time.time() < deadline: time.sleep(0.1)
    assert len(started) >= 2 and not at_work(killed.path), "a process of the killed run is left"
    assert not (killed/"anonymizer.safetensors").exists()
    trainer.train_on_devices(killed, show=lambda line: None)
    assert timeless(killed.metrics()) == timeless(rows)
    a, b = (load_file(r/"anonymizer.safetensors") for r in (straight, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def at_work(path):
    "Processes that have this run's folder among their arguments, the one that waits for them aside."
    found = []
    for f in Path("/proc").glob("[0-9]*/cmdline"):
        try: words = f.read_bytes().split(b"\0")
        except OSError: continue
        if b"rank" in words and str(path).encode() in words: found.append(int(f.parent.name))
    return found


def test_a_rank_that_fails_ends_all_with_its_reason(lab):
    lab, s = lab
    run = RunFolder.create(lab/"broken", replace(s, seed=1))
    (lab/"broken"/"_start").mkdir(parents=True)
    (lab/"broken"/"_start"/f"{start_key(run.settings)}.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="2 processes: .*damaged"): trainer.train_on_devices(run, show=lambda line: None)
    assert not at_work(run.path)
