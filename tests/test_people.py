"Who is where: two engines that agree, tracks, what is hidden, what is refused; by scripted detectors, and by the real networks where they are."
from dataclasses import replace
from importlib.util import find_spec
import numpy as np, pytest
from conftest import ROOT, SHARED, code_cells, python
from penaltyanon.avatar import blazepose, tracks
from penaltyanon.avatar.blazepose import BlazePose
from penaltyanon.avatar.finding import CausalFinder, HideRules, OwnMasks, find_people, hide_sightings, wrap_person
from penaltyanon.avatar.people import place_body
from penaltyanon.avatar.tracks import Sighting
from penaltyanon.avatar.windows import WindowPlan, cut_windows
from penaltyanon.nets.catalog import find_kept

WEIGHTS = find_kept("blazepose")        # of the user who runs the tests, not of the tests' own empty cache
needs_weights = pytest.mark.skipif(not WEIGHTS, reason="no weights here: penaltyanon weights fetch blazepose")
needs_litert = pytest.mark.skipif(not find_spec("ai_edge_litert"), reason="ai-edge-litert is not installed: pip install 'penaltyanon[avatar]'")
needs_clips = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason="no ../shared/data/ucf101-mini here")


@pytest.fixture(autouse=True)
def the_users_weights(monkeypatch):
    if WEIGHTS: monkeypatch.setenv("PENALTYANON_WEIGHTS", str(WEIGHTS.parents[1]))


def read_frames(name, count):
    import av
    with av.open(str(next((SHARED/"ucf101-mini").rglob(name)))) as film: return np.stack([f.to_ndarray(format="rgb24") for f, _ in zip(film.decode(video=0), range(count))])


@needs_weights
@needs_litert
@needs_clips
def test_both_engines_see_the_same_people():
    "Scores to 1e-3, landmarks to a fifth of a pixel, world points to a millimetre, masks but for a pixel in a thousand."
    frame = read_frames("v_Basketball_g01_c07.avi", 1)[0]
    lite, torch = BlazePose("litert"), BlazePose("torch")
    found = lite.detect(frame, 0.3)
    assert np.allclose([d.score for d in found], [d.score for d in torch.detect(frame, 0.3)], atol=1e-3) and len(found) >= 2
    rois = [d.roi for d in found]
    for a, b in zip(lite.pose(frame, rois), torch.pose(frame, rois), strict=True):
        assert (a is None) == (b is None)
        if a is None: continue
        assert np.abs(a.person.landmarks - b.person.landmarks).max() < 0.2 and np.abs(a.person.world - b.person.world).max() < 1e-3
        assert (a.person.mask != b.person.mask).mean() < 1e-3


@needs_weights
@needs_clips
def test_a_batch_is_its_squares_one_by_one():
    frame = read_frames("v_Basketball_g01_c07.avi", 1)[0]
    backend = BlazePose("torch", tiles=False)
    rois = [d.roi for d in backend.detect(frame, 0.3)][:2]
    together, alone = backend.pose(frame, rois), [backend.pose(frame, [roi])[0] for roi in rois]
    for a, b in zip(together, alone): assert np.allclose(a.person.landmarks, b.person.landmarks, atol=0.05)


def test_without_both_engines_there_is_one_line():
    code = ("import sys; sys.modules['torch'] = None; sys.modules['ai_edge_litert'] = None; from penaltyanon.avatar import blazepose; from penaltyanon.core.files import UserError\n"
            "blazepose.find_spec = lambda name: None\n"
            "try: blazepose.BlazePose()\nexcept UserError as e: print(e)")
    assert python("-c", code).strip() == "ai_edge_litert and torch: not installed; pip install 'penaltyanon[avatar]', or [train] for PyTorch"


# ---- scripted people: everybody's place is known in every frame
def lesson(notebook, name, **more):
    "The class or function that a lesson defines."
    cell = next(c.source for c in code_cells(ROOT/notebook) if f"class {name}" in c.source or f"def {name}" in c.source)
    scope = {**vars(blazepose), **vars(tracks), "place_body": place_body, **more}
    exec(cell, scope)
    return scope[name]


Script = lesson("nbs/avatar/8_tracks.ipynb", "Script")


def truth(script):
    "Masks of everybody, by frame."
    return [[script.body(*p).person.mask for p in here.values()] for here in script.people]


def seen_share(script, found):
    "Of each frame's people, the share of pixels that are not hidden, the worst."
    return np.array([max((1 - f.hidden[m].mean() for m in masks), default=0.0) for f, masks in zip(found, truth(script), strict=True)])


def names(found): return sorted({p.track for f in found for p in f.people})


def test_crossing_hides_both():
    "Two people may exchange their names where they cross, and be given new ones; neither is ever seen."
    script = Script([{"a": (15 + 2 * t, 40), "b": (105 - 2 * t, 40)} for t in range(46)])
    found = find_people(script.frames(), script)
    assert seen_share(script, found).max() == 0 and len(names(found)) <= 4
    assert all(len(f.people) == 2 for f in (*found[:15], *found[-15:]))


@pytest.mark.parametrize("away", [4, 9])
def test_behind_a_lectern_one_name_stays(away):
    script = Script([{} if 20 <= t < 20 + away else {"a": (15 + 2 * t, 40)} for t in range(45)])
    found = find_people(script.frames(), script)
    assert names(found) == [0] and seen_share(script, found).max() == 0
    assert all(len(f.people) == 1 for f in found), "bridged where nobody could be seen"


def test_a_long_absence_is_not_bridged_but_keeps_its_name():
    script = Script([{} if 15 <= t < 29 else {"a": (30 + t / 2, 40)} for t in range(45)])
    found = find_people(script.frames(), script)
    assert names(found) == [0] and not any(f.people for f in found[15:29])


def test_who_enters_late_and_leaves_early_is_hidden_from_the_first_frame_to_the_last():
    script = Script([{"a": (20 + t, 40)} if 7 <= t < 33 else {} for t in range(45)])
    found = find_people(script.frames(), script)
    assert seen_share(script, found).max() == 0 and names(found) == [0]
    assert [t for t, f in enumerate(found) if f.people] == list(range(7, 33))


@pytest.mark.parametrize("seed", range(3))
def test_a_detector_that_misses_half_of_its_looks_leaks_nothing(seed):
    "Each look misses each person with probability one half, but for one; the walk both ways finds them all."
    rng = np.random.default_rng(seed)
    misses = {(t, who): rng.random() < 0.5 for t in range(60) for who in "ab"} | {(10, "a"): False, (10, "b"): False}
    script = Script([{"a": (15 + 1.5 * t, 40), "b": (100 - t / 2, 24)} if t < 25 else {"a": (15 + 1.5 * t, 40)} for t in range(60)], undetected=lambda t, who: misses[t, who])
    found = find_people(script.frames(), script)
    assert seen_share(script, found)[:25].max() == 0 and seen_share(script, found).max() == 0


def test_a_pose_network_that_fails_in_a_third_of_the_frames_leaks_nothing():
    script = Script([{"a": (20 + 1.5 * t, 40)} for t in range(60)])
    pose, fails = script.pose, {t for t in range(60) if t % 9 in (3, 4, 5)}
    script.pose = lambda frame, rois: [None] * len(rois) if int(frame[0, 0, 0]) in fails else pose(frame, rois)
    found = find_people(script.frames(), script)
    assert seen_share(script, found).max() == 0 and names(found) == [0]


def test_somebody_without_a_pose_is_a_box():
    script = Script([{"a": (60, 40)}] * 20)
    script.pose = lambda frame, rois: [None] * len(rois)
    found = find_people(script.frames(), script)
    assert not any(f.people for f in found) and all(f.hidden[5:55, 40:80].all() for f in found) and not any(f.refused for f in found)


def test_doubt_widens_then_removes_then_refuses():
    person = place_body((60, 30), 40, (60, 120))
    cover = {c: hide_sightings([Sighting([wrap_person(replace(person, confidence=c))])], (60, 120))[0] for c in (0.9, 0.6)}
    assert cover[0.6].hidden.sum() > 1.2 * cover[0.9].hidden.sum() and (cover[0.6].hidden >= cover[0.9].hidden).all()      # widens
    boxed = hide_sightings([Sighting([], [(40, 5, 80, 55)])], (60, 120))[0]
    assert not boxed.people and boxed.hidden[5:55, 40:80].all() and not boxed.refused                                       # removes
    full = hide_sightings([Sighting([], [(-1, -1, 121, 61)])], (60, 120))[0]
    assert full.refused == "people hide 100% of the frame"                                                                  # refuses
    lost = [Sighting([wrap_person(replace(person, track=t))]) for t in range(20)]
    assert "20 tracks of at most 1 people" in hide_sightings(lost, (60, 120))[10].refused


def test_hidden_contains_every_mask_and_grows_with_every_rule():
    script = Script([{"a": (20 + 2 * t, 40)} for t in range(30)])
    frames = script.frames()
    plain = find_people(frames, script, hide=HideRules(bone=0, margin=0, closing=0, hold=0))
    for rule in (dict(bone=0.22), dict(margin=0.2), dict(closing=12), dict(hold=25)):
        more = find_people(frames, script, hide=HideRules(**(dict(bone=0, margin=0, closing=0, hold=0) | rule)))
        assert all((b.hidden >= a.hidden).all() for a, b in zip(plain, more)), rule
    for f in plain:
        for p in f.people: assert f.hidden[p.mask].all()


def test_windows_see_what_the_whole_clip_sees():
    "Of each window the frames that are due: the same people in the same places, hidden at least where they are."
    script = Script([{"a": (15 + t, 40), **({"b": (105 - t, 24)} if 20 <= t < 70 else {})} for t in range(90)])
    frames = list(script.frames())
    whole = find_people(np.stack(frames), script)
    parts = [(w, find_people(np.stack(w.frames), script)) for w in cut_windows(frames, WindowPlan(length=30, overlap=12))]
    due = [f for w, found in parts for f in found[w.start:w.stop]]
    assert len(due) == 90 and len(parts) == 3
    assert seen_share(script, due).max() == 0
    for a, b in zip(whole, due):
        xs = [sorted(float(p.landmarks[0, 0]) for p in f.people) for f in (a, b)]
        assert len(xs[0]) == len(xs[1]) and np.allclose(*xs, atol=0.02)


def test_a_camera_does_not_know_the_future_and_keeps_nothing():
    script = Script([{"a": (15 + t, 40)} for t in range(90)])
    frames, finders, sizes = script.frames(), [CausalFinder(script) for _ in range(2)], []
    for frame in frames[:40]: early = finders[1].step(frame)
    for t, frame in enumerate(frames):
        f = finders[0].step(frame)
        if t == 39: assert (f.hidden == early.hidden).all()
        assert f.hidden[truth(script)[t][0]].all()
        sizes.append((len(finders[0].seen), len(finders[0].covers), len(finders[0].tracker.lost), len(finders[0].tracker.current)))
    assert max(sizes) <= (65, 5, 1, 1) and len(finders[0].seen) == 65


def test_the_memory_of_long_videos_does_not_grow(monkeypatch):
    "Two hundred frames hold as much as eighty: what a window leaves behind is its overlap."
    script = Script([{"a": (60, 40)}] * 200)
    held = []
    for w in cut_windows(iter(list(script.frames())), WindowPlan(length=30, overlap=12)):
        find_people(np.stack(w.frames), script)
        held.append(len(w.frames))
    assert max(held) <= 30 + 2 * 12 and len(held) >= 6


def test_puppets_by_their_own_masks():
    "Generated people, whose masks are the truth: nothing of them is left, no weights are needed."
    masks = np.zeros((20, 60, 80), bool)
    for t in range(20): masks[t, 10:50, 10 + 2 * t:20 + 2 * t] = True
    found = find_people(np.zeros((20, 60, 80, 3), np.uint8), OwnMasks(masks))
    assert all(f.hidden[m].all() for f, m in zip(found, masks)) and not any(f.people for f in found)


def test_a_smoothed_hand_does_not_lag():
    "Lag by cross-correlation: none, for a wave of half a second at 30 frames a second."
    t = np.arange(120)
    wave = 20 * np.sin(2 * np.pi * t / 15)
    noisy = wave + np.random.default_rng(0).normal(size=120)
    smooth = tracks.smooth_values(noisy, list(t))
    lags = [np.corrcoef(np.roll(wave, k)[10:-10], smooth[10:-10])[0, 1] for k in range(-4, 5)]
    assert np.argmax(lags) == 4 and np.abs(smooth - wave)[10:-10].mean() < np.abs(noisy - wave)[10:-10].mean() + 0.5


@needs_weights
@needs_clips
def test_a_real_clip_of_two_people():
    "Two players of basketball, eight frames: both are followed under one name each, and hidden by more than their masks."
    found = find_people(read_frames("v_Basketball_g01_c07.avi", 8), BlazePose())
    assert [len(f.people) for f in found] == [2] * 8 and names(found) == [0, 1] and not any(f.refused for f in found)
    assert all(0.03 < f.hidden.mean() < 0.25 for f in found)
