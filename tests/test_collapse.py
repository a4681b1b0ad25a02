"A training that ends in a constant picture, or with an f_T that knows nothing any more, is noticed: it goes back once, then it ends, and nothing is called done."
import math
from dataclasses import replace
import pytest, torch
from conftest import ROOT
from penaltyanon.core.checkpoints import Checkpointer, RunContext
from penaltyanon.core.files import UserError, read_rows
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.core.settings import resolve
from penaltyanon.data.puppets import write_puppets
from penaltyanon.train import minimax, trainer
from penaltyanon.train.batches import load_collections
from test_training import networks, quiet, streams

HEALTHY = dict(contrast=1.0, difference=1.0, accuracy=90.0, chance=12.5, clips=40)
DEAD = dict(HEALTHY, contrast=0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_puppets(root/"p", train=16, test=8, images=(16, 8), size=32, progress=False)
    return dict(action_data=f"puppets:{root}/p", privacy_data=f"puppets-images:{root}/p")


def start(folder, data, **changes):
    s = resolve("smoke", **{**data, **dict(B=math.inf, penalty="none", steps=10, identity_steps=60, identity_lr=1e-2, warmup_steps=2, backbone="unet", decoder=(16,)), **changes})
    return RunFolder.create(folder, s), *load_collections(s)


def test_looking_changes_no_bit():
    "The weights of a watched training are those of one that nobody looked at."
    s = resolve("smoke", precision="fp32", steps=4, lr_anonymizer=1e-3)
    weights = []
    for watched in (None, lambda: [(torch.rand(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(4) % 3)]):
        nets = networks(s)
        minimax.minimax(nets, *streams(), quiet(s), watched=watched)
        weights.append(torch.cat([v.flatten().double() for net in (nets.f_A, nets.f_T, nets.f_B) for v in net.state_dict().values()]))
        assert len(nets.health) == (0 if watched is None else 5)
    assert torch.equal(*weights)


@pytest.mark.parametrize("changes", [dict(lr_anonymizer=0.1), dict(weight_privacy=50.0, lr_anonymizer=0.3)], ids=["rate", "weight"])
def test_a_training_that_really_collapses_leaves_nothing(tmp_path, data, changes):
    run, actions, images = start(tmp_path, data, **changes)
    with pytest.raises(UserError, match=r"training collapsed by step \d+: f_A draws nearly one picture.*lower lr_anonymizer") as error:
        trainer.train(run, actions, images, progress=False)
    assert "\n" not in str(error.value) and error.value.exit_code != 0
    assert not (run/"anonymizer.safetensors").exists() and not (run/"DONE").exists()
    rows = [r for r in run.metrics() if "health_contrast" in r]
    assert min(rows[-1]["health_contrast"], rows[-1]["health_difference"]) < minimax.CONSTANT_BELOW, "the rows say what was seen"


def test_a_training_that_starts_from_one_picture_says_what_was_missing(tmp_path, data):
    "A copy that was never learnt is no collapse: a smaller rate would not help, and nothing is tried again."
    run, actions, images = start(tmp_path, data, identity_steps=2, identity_lr=1e-4)
    with pytest.raises(UserError, match=r"nearly one picture.*before the first step; raise identity_steps \(now 2\)") as error:
        trainer.train(run, actions, images, progress=False)
    assert not isinstance(error.value, minimax.CollapseError) and not (run/"anonymizer.safetensors").exists()


def scripted(monkeypatch, dead_at):
    "Health as written down: the n-th look is dead for n in `dead_at`."
    seen = []
    def measure(nets, watched, s):
        seen.append(nets.step)
        return dict(DEAD if len(seen) - 1 in dead_at else HEALTHY)
    monkeypatch.setattr(minimax, "measure_health", measure)
    return seen


def test_it_goes_back_once_and_the_record_says_so(tmp_path, data, monkeypatch):
    seen = scripted(monkeypatch, dead_at=(4,))
    run, actions, images = start(tmp_path, data, health_every=2)
    f_A, record = trainer.train(run, actions, images, progress=False)
    assert seen == [0, 2, 4, 6, 8, 8, 10], "collapsed by step 8, back to 6"
    assert "collapsed by step 8" in record["recovered"] and "went on from step 6 with lr_anonymizer=0.00017" in record["recovered"]
    steps = [r["step"] for r in run.metrics() if r["stage"] == "minimax"]
    assert steps == list(range(1, 11)), "each step once, as it was done in the end"
    assert trainer.train(run, actions, images)[1] == record, "in the weights file as well"
    assert not list((run/"checkpoints").iterdir())


def test_it_goes_back_to_a_look_that_was_healthy_itself(tmp_path, data, monkeypatch):
    "80, 80, 80, 10, 10: the first 10 might have been an accident and was none; the way back ends at the last 80."
    accuracies, seen = [80, 80, 80, 10, 10, 80, 80, 80], []
    def measure(nets, watched, s):
        seen.append(nets.step)
        return dict(HEALTHY, accuracy=accuracies[len(seen) - 1])
    monkeypatch.setattr(minimax, "measure_health", measure)
    run, actions, images = start(tmp_path, data, health_every=2)
    record = trainer.train(run, actions, images, progress=False)[1]
    assert seen == [0, 2, 4, 6, 8, 6, 8, 10]
    assert "collapsed by step 8" in record["recovered"] and "went on from step 4" in record["recovered"]


def test_one_watched_clip_has_no_differences_and_no_nan():
    nets = networks(s := resolve("smoke", precision="fp32"))
    one = minimax.measure_health(nets, [(torch.rand(1, 3, 4, 32, 32), torch.tensor([1]))], s)
    assert "difference" not in one and all(map(math.isfinite, one.values())) and minimax.find_collapse([one]) == ""


def test_a_second_collapse_ends_the_run_also_after_a_kill(tmp_path, data, monkeypatch):
    scripted(monkeypatch, dead_at=(4, 6))
    run, actions, images = start(tmp_path, data, health_every=2)
    with pytest.raises(minimax.CollapseError, match="collapsed by step 10"): trainer.train(run, actions, images, progress=False)
    scripted(monkeypatch, dead_at=range(9))
    with pytest.raises(minimax.CollapseError): trainer.train(run, actions, images, progress=False)
    assert len(read_rows(run/"metrics.jsonl")) and not (run/"anonymizer.safetensors").exists()


def test_there_is_a_way_back_to_the_beginning(tmp_path, data, monkeypatch):
    scripted(monkeypatch, dead_at=(1,))
    run, actions, images = start(tmp_path, data, steps=3, health_every=1)
    record = trainer.train(run, actions, images, progress=False)[1]
    assert "collapsed by step 1:" in record["recovered"] and "went on from step 0" in record["recovered"]


def test_a_small_or_untrained_f_T_is_no_collapse():
    "What the presets for tests do: a few clips, and an f_T that has hardly begun."
    def looks(*accuracies, **more): return [dict(HEALTHY, accuracy=a, **more) for a in accuracies]
    assert minimax.find_collapse(looks(12, 10, 14)) == "" == minimax.find_collapse(looks(90, 0, 0, clips=6))
    assert minimax.find_collapse(looks(90, 12, 80, 12)) == "", "one bad look"
    assert "no better than chance" in minimax.find_collapse(looks(90, 60, 12, 14))


def test_states_from_before_open(tmp_path):
    s = resolve("smoke", precision="fp32")
    state = minimax.training_state(networks(s))
    for name in ("health", "recovered"): del state[name]
    nets = minimax.resume_training(networks(s), state)
    assert (nets.health, nets.recovered) == ([], "")
