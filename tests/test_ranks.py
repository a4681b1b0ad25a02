"Two processes that share a batch make the step of one process that has it whole."
import os, subprocess, sys
from pathlib import Path
import pytest, torch
from conftest import ROOT

pytest.importorskip("lightning_fabric", reason="needs lightning-fabric: pip install 'penaltyanon[train]'")


def play(tmp_path, devices, gather=True, method="spact"):
    out = tmp_path/f"{devices}-{gather}-{method}.pt"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests"), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    for k in ("MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK"): env.pop(k, None)
    r = subprocess.run([sys.executable, str(Path(__file__).parent/"rank_worker.py"), str(devices), "gather" if gather else "alone", method, str(out)], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    return torch.load(out, weights_only=True)


def off(a, b): return float((a - b).norm()/b.norm())


@pytest.mark.parametrize("method", ["penalty", "vita"])
def test_gradients_and_game_are_those_of_the_whole_batch(tmp_path, method):
    "The first step's gradients of all three networks, and what a short game logs: NT-Xent with a bound, and supervised labels."
    one, two = play(tmp_path, 1, method=method), play(tmp_path, 2, method=method)
    for net in ("f_A", "f_T", "f_B"):
        assert off(two["grads"][net], one["grads"][net]) < 1e-4, (net, off(two["grads"][net], one["grads"][net]))
    assert len(two["rows"]) == len(one["rows"]) == 4
    for step, close in ((0, 1e-4), (3, 2e-2)):       # Adam's first steps are signs: rounding of a gradient near zero moves a weight by a whole step, the game hardly
        for key in ("loss_action", "loss_privacy", "rms_clips", "rms_images"): assert two["rows"][step][key] == pytest.approx(one["rows"][step][key], rel=close), (step, key)
    assert two["lam"] == pytest.approx(one["lam"], rel=2e-2)


def test_without_the_others_negatives_it_is_another_loss(tmp_path):
    "What the comparison above would catch: each process with its own images only."
    one, wrong = play(tmp_path, 1, method="penalty"), play(tmp_path, 2, gather=False, method="penalty")
    assert off(wrong["grads"]["f_B"], one["grads"]["f_B"]) > 0.05
