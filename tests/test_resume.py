"A run that is killed and started again is the run that was not: bit for bit, wherever it was killed."
import errno, os, random, signal, time
from pathlib import Path
from collections import Counter
import numpy as np, pytest, torch
from safetensors.torch import load_file
from penaltyanon.sweep import grid
from penaltyanon.train import batches, minimax
from penaltyanon.core import settings
from penaltyanon.nets.anonymizers import UNet, freeze_batchnorm
from penaltyanon.core.checkpoints import Checkpointer, read_checkpoint
from penaltyanon.core.files import UserError, read_json, read_rows
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.core.settings import resolve, start_key
from penaltyanon.data.datasets import ClipDataset
from penaltyanon.data.sources import open_data
from test_training import CPU, quiet, streams


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = tmp_path_factory.mktemp("lab")
    base = dict(action_data=f"puppets:{lab}/data", privacy_data=f"puppets-images:{lab}/data", B=0.3, save_minutes=0.0, log_every=1,
                steps=8, identity_steps=8, warmup_steps=6, eval_action_epochs=2, eval_privacy_epochs=2, precision="fp32", backbone="unet", decoder=[16])
    def cell(**more): return resolve("smoke", **(base | more))
    grid.prepare_data(cell())
    return lab, lab/"log", cell


def timeless(x):
    "Results without what a clock says."
    if isinstance(x, dict): return {k: timeless(v) for k, v in x.items() if k not in ("ms", "minutes", "date")}
    return [timeless(v) for v in x] if isinstance(x, list) else x


def whole(root, s):
    "All that a finished run claims."
    path = root/settings.run_name(s)
    assert (path/"DONE").exists()
    start = (root/"_start"/f"{start_key(s)}.safetensors").read_bytes()
    return dict(rows=timeless(read_rows(path/"metrics.jsonl")), results=timeless(read_json(path/"results.json")), start=start,
                weights=load_file(path/"anonymizer.safetensors"), scores=dict(np.load(path/"predictions.npz")))


def assert_same(a, b):
    assert a["rows"] == b["rows"] and a["results"] == b["results"] and a["start"] == b["start"]
    for part in ("weights", "scores"):
        assert a[part].keys() == b[part].keys()
        for k in a[part]: assert np.array_equal(np.asarray(a[part][k]), np.asarray(b[part][k])), k


@pytest.fixture(scope="module")
def straight(lab, finish_attempt):
    lab, log, cell = lab
    finish_attempt(cell(), lab/"straight", log)
    return whole(lab/"straight", cell())


def stage_of(run, start):
    "What the attempt is at, by the last row that it wrote."
    row = next((r for rows in (run/"metrics.jsonl", start) for r in read_rows(rows)[-1:]), {})
    return row.get("stage", ""), row.get("step", 0)


STAGES = ["identity", "warmup", "minimax", "eval-action", "eval-privacy-images", "eval-privacy-frames"]


def test_killed_at_twenty_moments(lab, straight, start_attempt, finish_attempt):
    "Every stage is hit, at random steps of it and a random moment after."
    lab, log, cell = lab
    s, root, draw, hit = cell(), lab/"killed", random.Random(0), Counter()
    run, start = root/settings.run_name(s), root/"_start"/f"{start_key(s)}.jsonl"
    plan = [(stage, step) for stage, last in zip(STAGES, (7, 5, 7, 1, 1, 1)) for step in sorted(draw.sample(range(1, last + 1), min(6, last)))]
    for stage, step in plan:
        seen, deadline = ("", 0), time.time() + 120
        p = start_attempt(s, root, log)
        while seen[0] != stage or seen[1] < step:
            seen = stage_of(run, start)
            assert time.time() < deadline and STAGES.index(seen[0] or "identity") <= STAGES.index(stage), f"{stage} was missed: {seen}"
            if not p.is_alive(): break
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        p.kill(); p.join()
        kept = read_rows(run/"metrics.jsonl")[:-2]
        if p.exitcode == -signal.SIGKILL: hit[stage] += 1
        else: assert (run/"DONE").exists(), log.read_text()[-2000:]
    if not (run/"DONE").exists(): finish_attempt(s, root, log)
    assert_same(whole(root, s), straight)
    assert sum(hit.values()) >= len(plan) - 3 and len(hit) == len(STAGES), hit
    assert not (run/"checkpoints").exists() and len(read_json(run/"env.json")["resumed"]) > sum(hit.values()) - hit["identity"] - hit["warmup"]
    assert len(kept) > 20 and read_rows(run/"metrics.jsonl")[:len(kept)] == kept, "what was done before the last kill was not done again: even the clock's ms are the same"


@pytest.mark.parametrize("seed", range(2))
def test_killed_while_a_file_is_written(lab, straight, start_attempt, finish_attempt, seed):
    lab, log, cell = lab
    s, root, draw, died = cell(), lab/f"torn{seed}", random.Random(seed), 0
    for _ in range(3):
        p = start_attempt(s, root, log, draw.randint(10, 60)); p.join()
        died += p.exitcode == -signal.SIGKILL
        if (root/settings.run_name(s)/"DONE").exists(): break
    else: finish_attempt(s, root, log)
    assert died >= 2
    assert_same(whole(root, s), straight)


def test_rows_of_the_start_are_part_of_every_run(lab, straight, finish_attempt):
    "Identity and warm-up are done once for all runs that begin there; whoever did them, each run tells of them."
    lab, log, cell = lab
    finish_attempt(other := cell(B=0.7), lab/"straight", log)
    beginning = lambda rows: [r for r in rows if r["stage"] in ("identity", "warmup")]
    assert beginning(whole(lab/"straight", other)["rows"]) == beginning(straight["rows"]) != []


def test_workers_change_nothing(lab, straight, finish_attempt):
    lab, log, cell = lab
    finish_attempt(s := cell(workers=2), lab/"workers", log)
    assert_same(whole(lab/"workers", s), straight)


@pytest.mark.parametrize("change", ["vanished", "other bytes", "other label"])
def test_data_that_changed_are_noticed(lab, start_attempt, change):
    "A run that was interrupted goes on with its own data or not at all."
    lab, log, cell = lab
    s, root = cell(steps=13, seed=5), lab/"changed"
    path = root/settings.run_name(s)
    if not path.exists():
        p = start_attempt(s, root, log, 60); p.join(); assert p.exitcode == -signal.SIGKILL
    clip = sorted((lab/"data"/"UCF-101").rglob("*.avi"))[0]
    labels = next(f for f in (lab/"data").iterdir() if f.suffix == ".csv")
    file = labels if change == "other label" else clip
    before = file.read_bytes()
    try:
        if change == "vanished": file.unlink()
        elif change == "other bytes": file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        else: file.write_bytes(before.replace(b",0", b",1", 1))
        log.write_text(""); p = start_attempt(s, root, log); p.join()
        assert p.exitcode == 1
        said = log.read_text().strip().splitlines()[-1]
        assert (clip.name if file == clip else "labels") in said and "Error" in said, said
    finally: file.write_bytes(before); os.utime(file)


# ---- minimax training alone, in this process: what else can go wrong
def networks(s, seed=0):
    seed_everything(seed)
    return minimax.make_networks(s, freeze_batchnorm(UNet((16,), 0.5)), 3, CPU)


def train(box, p=None, steps=6, **changes):
    s = resolve("smoke", precision="fp32", save_minutes=0.0, lr_anonymizer=1e-3, **changes)
    p = p or networks(s)
    box.mkdir(exist_ok=True)
    checkpointer = Checkpointer(box/"train.ckpt", s)
    minimax.minimax(p, *streams(), quiet(s, checkpointer=checkpointer), steps=steps)
    return torch.cat([q.detach().flatten() for q in p.f_A.parameters()])


@pytest.fixture(scope="module")
def weights(tmp_path_factory): return train(tmp_path_factory.mktemp("g")/"a")


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_disk_that_takes_no_more(tmp_path, monkeypatch, weights, kind, at):
    "The error is one line, what was kept is whole, and with room again the training goes on from there."
    calls, fsync = [], os.fsync
    def full(fd):
        calls.append(fd)
        if len(calls) == at: raise OSError(kind, os.strerror(kind))
        fsync(fd)
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="cannot be written .*make room") as e: train(tmp_path/"k")
    assert "\n" not in str(e.value) and not list((tmp_path/"k").glob(".*"))
    kept = read_checkpoint(tmp_path/"k"/"train.ckpt")["stage"]
    assert kept == ("begin" if at == 2 else "minimax")
    assert torch.equal(train(tmp_path/"k", None if kept == "begin" else networks(resolve("smoke"), seed=3)), weights)


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, weights, capsys):
    train(tmp_path/"k", steps=4)
    last = tmp_path/"k"/"train.ckpt"
    data = bytearray(last.read_bytes()); data[len(data)//2] ^= 1; last.write_bytes(data)
    assert torch.equal(train(tmp_path/"k", networks(resolve("smoke"), seed=3)), weights)
    assert "train.ckpt: damaged" in capsys.readouterr().out


def test_a_loss_that_is_no_number_stops_before_it_is_kept(tmp_path):
    with pytest.raises(UserError, match=r"loss_\w+ became (NaN|infinite) at step \d.*checkpoint"): train(tmp_path/"k", lr_action=1e30, lr_privacy=1e30)
    for path in (tmp_path/"k").glob("train.ckpt*"):
        parts = read_checkpoint(path)["state"].get("game", {})
        assert all(v.isfinite().all() for net in ("f_A", "f_B") for v in parts.get(net, {}).values() if v.is_floating_point())


def test_memory_that_runs_out_says_what_to_lower(tmp_path, monkeypatch, weights):
    calls, step = [], minimax.anonymizer_step
    def hungry(*args):
        calls.append(1)
        if len(calls) == 4: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return step(*args)
    with monkeypatch.context() as m:
        m.setattr(minimax, "anonymizer_step", hungry)
        with pytest.raises(UserError, match="out of memory; lower batch_clips"): train(tmp_path/"k")
    assert torch.equal(train(tmp_path/"k", networks(resolve("smoke"), seed=3)), weights)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(tmp_path/"k", steps=1)
    with pytest.raises(UserError, match=r"other settings \(B: 0.3 and 0.7\)"): train(tmp_path/"k", B=0.7)


def test_a_clip_that_vanishes_during_an_epoch_is_named(lab):
    lab, _, cell = lab
    records = open_data(f"puppets:{lab}/data", 1).train
    gone = Path(records[0].path).rename(records[0].path.with_suffix(".gone"))
    try:
        stream = batches.EndlessBatches(ClipDataset(records[:2], frames=4, size=16, train=True), 2, 0)
        with pytest.raises(UserError, match=records[0].path.name): next(stream)
    finally: gone.rename(records[0].path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises(UserError, match="cannot be written"): RunFolder.create(tmp_path/"file", resolve("smoke"))
