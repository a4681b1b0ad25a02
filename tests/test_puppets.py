"The puppets keep their two promises: actions only in the motion, attributes only in the looks (what probes see on files: data/5_puppets)."
import hashlib, json
import numpy as np, pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image
from scipy.stats import chi2_contingency, ks_2samp
from penaltyanon.data import puppets
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.data.sources import open_data
from penaltyanon.data.puppets import (ACTIONS, ATTRIBUTES, VARIANTS, draw_clip, draw_frame, draw_scene, draw_script,
                                      place_joints, pose_at, skeleton, write_puppets)
from penaltyanon.data.video import frame_count, read_frames

quick = hypothesis_settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
codes = st.tuples(*[st.integers(0, 1)] * 5)
kinds = st.sampled_from([(name, action) for name, variant in VARIANTS.items() for action in variant.actions])
both = pytest.mark.parametrize("variant", VARIANTS)
generator = np.random.default_rng
TINY = dict(train=16, test=8, images=(6, 4), frames=4, progress=False)


def content(root): return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


# the variants

# what the code before there was a second variant drew, and what variant b drew when it was new: the committed runs stand on these bytes
DRAWN = {"a": "d79b875d5a33cd2d", "b": "fb5ac313e62ec6bc"}
DEALT = {"a": "5815f8a7f334c4fe", "b": "3e7aa2abb55d4fa9"}


@both
def test_the_bytes_of_a_variant_never_change(variant):
    drawn, dealt = hashlib.sha256(), hashlib.sha256()
    for i, action in enumerate(VARIANTS[variant].actions):
        scene = draw_scene(generator([0, 1, i]), action, (i & 1, i >> 1 & 1, i >> 2 & 1, 1, i & 1), 48, variant)
        for oracle in (False, True): drawn.update(draw_clip(scene, 8, oracle).numpy().tobytes())
    for deal in (puppets._deal_clips, puppets._deal_images): dealt.update(repr([tuple(x) for x in deal(generator(0), 40, 20, variant)]).encode())
    assert (drawn.hexdigest()[:16], dealt.hexdigest()[:16]) == (DRAWN[variant], DEALT[variant]), "another PUPPETS_VERSION, and new runs, if this is meant"


def test_the_variants_share_nothing():
    a, b = VARIANTS["a"], VARIANTS["b"]
    assert (a.actions, a.attributes) == (ACTIONS, ATTRIBUTES) and len(b.actions) == 8 and len(b.attributes) == 5
    assert not {*a.actions, *a.attributes} & {*b.actions, *b.attributes}
    assert not (np.asarray(draw_scene(generator(0), "Wave", (0,) * 5).backdrop) == np.asarray(draw_scene(generator(0), "Bow", (0,) * 5, variant="b").backdrop)).all()


def test_a_variant_does_not_know_the_other_ones_actions():
    for action, variant, known in (("Bow", "a", "Clap, Jump"), ("Wave", "b", "ArmCircle, Bow")):
        with pytest.raises(UsageError, match=f"puppets: variant {variant} has no action {action}; give one of {known}"): draw_scene(generator(0), action, (0,) * 5, variant=variant)


# exact statements about single draws

@quick
@given(seed=st.integers(0, 10**6), kind=kinds, one=codes, two=codes, t=st.integers(0, 39))
def test_the_oracle_does_not_depend_on_the_attributes(seed, kind, one, two, t):
    variant, action = kind
    a, b = (draw_frame(draw_scene(generator(seed), action, code, variant=variant), t, oracle=True) for code in (one, two))
    assert a.tobytes() == b.tobytes()


@both
@quick
@given(seed=st.integers(0, 10**6), code=codes)
def test_the_first_frame_does_not_depend_on_the_action(variant, seed, code):
    frames = {draw_frame(draw_scene(generator(seed), action, code, variant=variant), 0).tobytes() for action in VARIANTS[variant].actions}
    assert len(frames) == 1


@both
@quick
@given(seed=st.integers(0, 10**6), code=codes, i=st.integers(0, 4))
def test_every_attribute_changes_the_picture(variant, seed, code, i):
    other = [bit ^ (j == i) for j, bit in enumerate(code)]
    a, b = (np.asarray(draw_frame(draw_scene(generator(seed), VARIANTS[variant].actions[seed % 8], c, variant=variant), 0), dtype=int) for c in (code, other))
    assert (abs(a - b).max(-1) > 40).mean() > 0.002           # at least a dozen pixels, clearly


@pytest.mark.parametrize("i", range(5))
def test_the_attributes_of_variant_b_are_seen_at_48_pixels(i):
    def changed(seed):
        code = generator(seed).integers(0, 2, 5)
        a, b = (np.asarray(draw_frame(draw_scene(generator(seed), "Bow", np.where(np.arange(5) == i, bit, code), 48, "b"), 0), dtype=int) for bit in (0, 1))
        return (abs(a - b).max(-1) > 40).sum()
    seen = [changed(seed) for seed in range(60)]
    assert np.median(seen) >= 12 and np.quantile(seen, 0.1) >= 6


@quick
@given(seed=st.integers(0, 10**6), kind=kinds)
def test_every_action_moves_and_its_companion_does_not(seed, kind):
    variant, action = kind
    scene = draw_scene(generator(seed), action, (0, 1, 0, 0, 1), variant=variant)
    body = (draw_clip(scene, 18, oracle=True)[:, 0] < 180).float()
    assert (body[3:] - body[:-3]).abs().mean((1, 2)).max() > 0.004
    still = draw_clip(draw_scene(generator(seed), None, (0, 1, 0, 0, 1), variant=variant), 3)
    assert (still == still[:1]).all()


@both
def test_at_any_time_every_action_has_the_same_poses(variant):
    actions = VARIANTS[variant].actions
    for t in (5, 23):
        poses = {a: np.array([list(pose_at(draw_script(r, a, variant), t).values()) for r in [generator([t, i])] for _ in range(800)]) for i, a in enumerate(actions)}
        p = [ks_2samp(poses[a][:, j], np.concatenate([poses[b] for b in actions if b != a])[:, j]).pvalue for a in actions for j in range(len(VARIANTS[variant].base))]
        assert min(p) > 0.05 / len(p)


@both
def test_heads_stay_in_the_picture(variant):
    r = generator(0)
    for _ in range(500):
        scene = draw_scene(r, VARIANTS[variant].actions[r.integers(8)], (0, 0, 0, 0, 0), size=32, variant=variant)
        heads = np.array([place_joints(skeleton(pose_at(scene.script, t)), scene.camera)["head"] for t in range(18)]) / scene.backdrop.width
        assert (heads > 0.03).all() and (heads < 0.97).all()


# the deal

@quick
@given(seed=st.integers(0, 10**6), variant=st.sampled_from(list(VARIANTS)), train=st.integers(8, 700), test=st.integers(8, 300))
def test_the_deal_is_balanced_named_and_grouped(seed, variant, train, test):
    actions, clips = VARIANTS[variant].actions, puppets._deal_clips(generator(seed), train, test, variant)
    assert len({c.name for c in clips}) == len(clips) == train + test
    groups = {}
    for split, n in (("train", train), ("test", test)):
        part = [c for c in clips if c.split == split]
        per_action = np.bincount([actions.index(c.action) for c in part], minlength=8)
        assert len(part) == n and per_action.max() - per_action.min() <= 1
        for action in actions:
            bits = np.array([c.attributes for c in part if c.action == action])
            assert (abs(2 * bits.sum(0) - len(bits)) <= min(len(bits), 32 - len(bits) % 32)).all()
        groups[split] = {c.name.split("_")[-2] for c in part}
    assert not groups["train"] & groups["test"]


@both
def test_labels_are_independent(variant):
    actions = VARIANTS[variant].actions
    clips, images = puppets._deal_clips(generator([0, 0, 0]), 400, 160, variant), puppets._deal_images(generator([0, 0, 1]), 800, 300, variant)
    for split in ("train", "test", "train2017", "test2017"):
        table = np.array([(actions.index(c.action), *c.attributes) for c in clips + images if c.split == split])
        assert (abs(table[:, 1:].mean(0) - 0.5) < 0.05).all()
        for i in range(6):
            for j in range(i):
                counts = np.histogram2d(table[:, i], table[:, j], (table[:, i].max() + 1, table[:, j].max() + 1))[0]
                assert chi2_contingency(counts, correction=False).pvalue > 0.01, (split, i, j)


# files

@both
def test_same_seed_same_bytes(tmp_path, variant):
    a, b, c = (write_puppets(tmp_path/n, seed=seed, workers=w, variant=variant, **TINY) for n, seed, w in (("a", 5, 1), ("b", 5, 2), ("c", 6, 2)))
    assert content(a) == content(b)
    assert content(a).keys() == content(c).keys()
    media = [n for n in content(a) if n.endswith((".avi", ".png"))]
    assert len(media) == 2 * (16 + 8 + 6 + 4) and all(content(a)[n] != content(c)[n] for n in media)


@both
def test_layouts(tmp_path, variant):
    root, actions, attributes = write_puppets(tmp_path/"p", variant=variant, **TINY), VARIANTS[variant].actions, VARIANTS[variant].attributes
    said = json.loads((root/"puppets.json").read_text())
    assert (said["world"], tuple(said["actions"]), tuple(said["attributes"])) == (variant, actions, attributes)
    for spec in ("puppets", "puppets-oracle"):
        data = open_data(f"{spec}:{root}")
        assert (data.classes, data.attribute_names, data.excluded) == (actions, attributes, ())
        assert (len(data.train), len(data.test)) == (16, 8) and {r.frames for r in data.train + data.test} == {4}
        assert frame_count(data.train[0].path) == 4 and read_frames(data.train[0].path, [0]).shape == (1, 3, 80, 80)
    for spec in ("puppets-images", "puppets-oracle-images"):
        data = open_data(f"{spec}:{root}")
        assert data.attribute_names == attributes and (len(data.train), len(data.test)) == (6, 4)
        for r in data.train + data.test:
            note = json.loads(r.path.with_suffix(".json").read_text())
            assert note["labels"] == ([n for n, v in zip(attributes, r.attributes) if v] or ["a0_safe"])
            with Image.open(r.path) as image: assert image.size == (80, 80) and image.mode == "RGB"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("disk"), UserError("x")])
def test_an_interrupted_set_leaves_nothing(tmp_path, monkeypatch, stop):
    def halfway(folder, *args): (folder/"half.avi").write_bytes(b"x"); raise stop
    monkeypatch.setattr(puppets, "_make_all", halfway)
    with pytest.raises(stop if isinstance(stop, type) else type(stop)): write_puppets(tmp_path/"p", **TINY)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    root = write_puppets(tmp_path/"p", **TINY)
    before = content(root)
    with pytest.raises(UserError, match="holds other puppets \\(seed 0 instead of 1\\)"): write_puppets(root, seed=1, **TINY)
    assert write_puppets(root, **TINY) == root and content(root) == before
    with pytest.raises(UserError, match="holds other puppets \\(variant a instead of b\\); choose another folder"): write_puppets(root, variant="b", **TINY)
    said = json.loads((root/"puppets.json").read_text())
    (root/"puppets.json").write_text(json.dumps({k: v for k, v in said.items() if k != "world"}))       # as written before there were two
    assert write_puppets(root, **TINY) == root
    with pytest.raises(UserError, match="variant a instead of b"): write_puppets(root, variant="b", **TINY)
    (tmp_path/"file").write_text("x")
    with pytest.raises(UserError, match="holds no puppets"): write_puppets(tmp_path/"file", **TINY)
    assert (tmp_path/"file").read_text() == "x"
    (tmp_path/"empty").mkdir()
    assert (write_puppets(tmp_path/"empty", **TINY)/"puppets.json").is_file()


@pytest.mark.parametrize("bad", [dict(train=7), dict(test=0), dict(images=(5, 0)), dict(seed=-1), dict(size=31), dict(size=33), dict(frames=0), dict(workers=0), dict(variant="c")])
def test_bad_parameters(tmp_path, bad):
    with pytest.raises(UsageError, match=f"puppets: {next(iter(bad))} = "): write_puppets(tmp_path/"p", **bad)
    assert not list(tmp_path.iterdir())


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="sise"): write_puppets(tmp_path/"p", sise=64)
    assert not list(tmp_path.iterdir())
