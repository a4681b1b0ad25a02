"Pairs for NT-Xent: two views of one image, or two frames of one video that are four apart (supplementary, section 7)."
import math
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from penaltyanon.core.files import UsageError
from penaltyanon.core.settings import LATER_FIELDS, resolve, run_name, settings_hash
from penaltyanon.data import datasets
from penaltyanon.data.records import Record
from penaltyanon.train.batches import check_pairs, frame_data, load_collections
from penaltyanon.train.minimax import contrastive_loss


class Counting:
    "Stands in for a decoder: every pixel of frame i is i."
    def __call__(self, record, indices, short_side): return torch.stack([torch.full((3, short_side, short_side), i, dtype=torch.uint8) for i in indices])


@pytest.fixture
def pairs_of(monkeypatch):
    "The numbers of the two frames of a pair, in several epochs, of a video with so many frames."
    monkeypatch.setattr(datasets, "decode_record", Counting())
    monkeypatch.setattr(datasets, "train_clip", lambda frames, *_: frames.transpose(0, 1).float())
    def numbers(frames, epochs=60, **changes):
        s = resolve("smoke", cache=False, **{"pairs": "frames", **changes})
        data = frame_data(s, [Record(Path(f"{frames}.mp4"), "v", frames=frames)], True, seed=0, views=2)
        found = []
        for epoch in range(epochs):
            data.set_epoch(epoch)
            found.append(tuple(int(frame.max()) for frame in data[0]["frame"]))
        return found
    return numbers


def test_two_frames_of_one_video_are_four_apart(pairs_of):
    found = pairs_of(20)
    assert {b - a for a, b in found} == {4}
    assert min(a for a, _ in found) == 0 and max(b for _, b in found) == 19, "from the first frame to the last"


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_short_video_gives_its_first_and_last_frame(pairs_of, frames):
    assert set(pairs_of(frames)) == {(0, frames - 1)}
    assert set(pairs_of(5)) == {(0, 4)}


def test_views_are_of_one_frame(pairs_of):
    found = pairs_of(20, pairs="views")
    assert all(a == b for a, b in found) and len(set(found)) > 5


def test_data_without_a_second_frame_are_refused_in_one_line(tmp_path):
    from penaltyanon.data.puppets import write_puppets
    write_puppets(tmp_path/"p", train=8, test=8, images=(4, 2), size=32, frames=8, progress=False)
    s = resolve("smoke", pairs="frames", action_data=f"puppets:{tmp_path}/p", privacy_data=f"puppets-images:{tmp_path}/p")
    with pytest.raises(UsageError, match=r"pairs=frames: in puppets-images:.* use pairs=views, or videos"): load_collections(s)
    _, clips = load_collections(replace(s, privacy_data=s.action_data))
    assert clips.kind == "clips" and frame_data(s, clips.train, True, views=2)[0]["frame"].shape == (2, 3, 32, 32)
    check_pairs(replace(s, pairs="views"), load_collections(replace(s, pairs="views"))[1])


@pytest.mark.parametrize("fresh", [False, True])
def test_videos_as_privacy_data_go_the_whole_way(tmp_path, monkeypatch, fresh):
    "What is said of such data is true: looked at before, trained on in pairs of frames, judged by their frames."
    from penaltyanon.core.checkpoints import RunContext
    from penaltyanon.data.puppets import write_puppets
    from penaltyanon.evaluate.attackers import evaluate
    from penaltyanon.evaluate.store import part_bytes
    from penaltyanon.sweep import jobs, preflight
    from penaltyanon.train.trainer import make_run_networks, training_batches
    from penaltyanon.train.minimax import minimax
    from penaltyanon.train.methods import METHODS
    write_puppets(tmp_path/"p", train=16, test=8, images=(4, 2), size=32, frames=8, progress=False)
    spec = f"puppets:{tmp_path}/p"
    s = resolve("smoke", pairs="frames", action_data=spec, privacy_data=spec, steps=2, eval_fresh=fresh, eval_action_epochs=1, eval_privacy_epochs=1, device="cpu", bootstrap=20)
    plan = preflight.look_ahead([jobs.Job(s, tmp_path/"runs")], jobs.LocalResources(gpus=()))
    preflight.raise_missing(plan.needs)
    kept = sum(part_bytes(s, "clips", train, n) for train, n in ((True, 16), (False, 8)))
    assert next(n for n in plan.needs if n.what == "anonymized data").found.startswith(f"{preflight.in_words(kept)} needed")
    assert [n.kind for n in plan.needs].count("data") == 1
    actions, images = load_collections(s)
    context = RunContext(s, torch.device("cpu"), progress=False)
    nets = make_run_networks(s, actions, images, torch.device("cpu"))
    minimax(nets, *training_batches(s, actions, images, 4, 4), context, METHODS[s.method], 2)
    results, predictions = evaluate(nets.f_A, actions, images, context)
    assert all(len(predictions[part][2]) == 8 for part in ("images", "frames"))
    assert results["rms"]["images"] == results["rms"]["clips"] and results["privacy"]["images"]["n"] == 8


def brute_force(z, temperature, symmetric):
    "Eq. 6 read aloud, one anchor after the other; `symmetric` exchanges the two of each pair as well."
    z = np.asarray(z, np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    first, second = np.split(z, 2)
    def one_sided(anchors, partners):
        losses = []
        for i, anchor in enumerate(anchors):
            others = sum(math.exp(anchor @ anchors[j] / temperature) for j in range(len(anchors)) if j != i)
            others += sum(math.exp(anchor @ partner / temperature) for partner in partners)
            losses.append(-math.log(math.exp(anchor @ partners[i] / temperature) / others))
        return float(np.mean(losses))
    return (one_sided(first, second) + one_sided(second, first)) / 2 if symmetric else one_sided(first, second)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_is_eq_6_with_the_settings_of_the_run(temperature, symmetric):
    z = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    s = resolve("smoke", temperature=temperature, symmetric=symmetric)
    assert math.isclose(contrastive_loss(z, None, s).item(), brute_force(z, temperature, symmetric), rel_tol=1e-4)


def test_runs_that_say_nothing_of_pairs_keep_their_names():
    assert {"pairs", "temperature", "symmetric"} <= set(LATER_FIELDS)
    s = resolve("demo")
    assert run_name(s) == run_name(resolve("demo", pairs="views", temperature=0.1, symmetric=True))
    assert len({settings_hash(x) for x in (s, replace(s, pairs="frames"), replace(s, temperature=0.2), replace(s, symmetric=False))}) == 4
