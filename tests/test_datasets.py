"Data sets: every label checked, damaged files named, no pickle runs, items depend on (seed, epoch, index) alone."
import csv, json, os, pickle, shutil, warnings
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from conftest import SHARED
from penaltyanon import datasets
from penaltyanon.core import UsageError, UserError
from penaltyanon.datasets import (VISPR1, VP_ATTRIBUTES, ClipDataset, FrameDataset, Record, attribute_images, data_manifest, index_files, open_data,
                                  read_labels, split_holdout, ucf101, vispr)
from penaltyanon.video import read_frames, sample_indices, write_video

real = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason=f"no real data under {SHARED}; set PENALTYANON_SHARED")
LISTS = "ucfTrainTestlist"


@pytest.fixture(autouse=True, scope="module")
def index_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PENALTYANON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny_ucf(root, classes=("Jump", "Walk"), groups=4, frames=20):
    "UCF101's layout: two clips per group, group 1 is the test set, noise in the frames."
    lists, labels, rng = {"train": "", "test": ""}, "file,skin_color,face,note\n", np.random.default_rng(0)
    for i, c in enumerate(classes, 1):
        (root/"UCF-101"/c).mkdir(parents=True)
        for g in range(1, groups + 1):
            for k in 1, 2:
                name = f"{c}/v_{c}_g{g:02d}_c{k:02d}.avi"
                write_video(root/"UCF-101"/name, torch.from_numpy(rng.integers(0, 256, (frames + g, 3, 32, 48), dtype=np.uint8)))
                lists["test" if g == 1 else "train"] += f"{name} {i}\n" if g > 1 else f"{name}\n"
                labels += f"{name},{g % 2},{'' if k == 2 else 1},{g}\n"
    (root/LISTS).mkdir()
    (root/LISTS/"classInd.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate((*classes, "Unused"), 1)))
    for part, text in lists.items(): (root/LISTS/f"{part}list01.txt").write_text(text)
    (root/"vpucf_attributes.csv").write_text(labels)
    return root


@pytest.fixture(scope="module")
def ucf(tmp_path_factory): return tiny_ucf(tmp_path_factory.mktemp("data")/"tiny")


@pytest.fixture
def own(ucf, tmp_path): return Path(shutil.copytree(ucf, tmp_path/"own"))


def test_official_layout(ucf):
    c = ucf101(ucf, attributes="auto")
    assert c.classes == ("Jump", "Walk") and (len(c.train), len(c.test)) == (12, 4) and c.kind == "clips" and not c.excluded
    assert c.attribute_names == ("skin_color", "face")                      # `note` holds more than 0 and 1
    r = {r.name: r for r in c.train}["Walk/v_Walk_g03_c02.avi"]
    assert r.action == 1 and r.frames == 23 and r.attributes[0] == 1 and np.isnan(r.attributes[1]) and r.path.is_file()
    assert [r.name for r in ucf101(ucf/"UCF-101").train] == [r.name for r in c.train]
    assert open_data(f"ucf101:{ucf}").attribute_names == c.attribute_names and open_data(f"puppets:{ucf}").name == "puppets"


# ---- damage

def test_damaged_files_are_left_out_by_name(own):
    bad = own/"UCF-101/Jump/v_Jump_g02_c01.avi"; bad.write_bytes(bad.read_bytes()[:4000])
    with pytest.warns(UserWarning, match="1 of 16 files left out as damaged: Jump/v_Jump_g02_c01.avi"): c = ucf101(own)
    assert [n for n, _ in c.excluded] == ["Jump/v_Jump_g02_c01.avi"] and len(c.train) == 11
    assert data_manifest(c)["excluded"][0][0] == "Jump/v_Jump_g02_c01.avi"
    for item in ClipDataset(c.train, frames=4, size=16): assert item["clip"].shape == (3, 4, 16, 16)       # never inside an epoch


def test_files_are_decoded_once_and_again_when_they_change(own, monkeypatch):
    names, seen = ["Jump/v_Jump_g01_c01.avi", "Walk/v_Walk_g01_c01.avi"], []
    probe = datasets._probe
    monkeypatch.setattr(datasets, "_probe", lambda p: (seen.append(p.name), probe(p))[1])
    assert index_files(own/"UCF-101", names) == index_files(own/"UCF-101", names) and len(seen) == 2
    write_video(own/"UCF-101"/names[0], torch.zeros(7, 3, 32, 32, dtype=torch.uint8))
    assert index_files(own/"UCF-101", names)[0] == {names[0]: 7, names[1]: 21} and len(seen) == 3
    for broken in "", "[]", "{\"Jump/v_Jump_g01_c01.avi\": 3}", "{\"Jump/v_Jump_g01_c01.avi\": []}":
        datasets._index_file(own/"UCF-101").write_text(broken)               # a spoiled index costs time, nothing else
        assert index_files(own/"UCF-101", names)[0] == {names[0]: 7, names[1]: 21}


def test_without_a_place_for_the_index_it_goes_on(own, monkeypatch):
    (own/"file").touch(); monkeypatch.setenv("PENALTYANON_CACHE", str(own/"file"))
    with pytest.warns(UserWarning, match="PENALTYANON_CACHE"): assert len(ucf101(own).train) == 12


# ---- bad input: one line that names the thing and the way out

def refuse(call, match, kind=UserError):
    with warnings.catch_warnings(action="ignore"), pytest.raises(kind, match=match) as e: call()
    assert "\n" not in str(e.value) and e.value.exit_code == (2 if kind is UsageError else 1)


def test_missing_folders_and_lists(own, tmp_path):
    refuse(lambda: ucf101(tmp_path/"nowhere"), "nowhere: no such data folder")
    refuse(lambda: ucf101(tmp_path), "give the folder that holds UCF-101")
    refuse(lambda: ucf101(own, split=2), "trainlist02.txt: no such split list; there are testlist01.txt, trainlist01.txt")
    (own/LISTS/"classInd.txt").unlink(); refuse(lambda: ucf101(own), "classInd.txt: missing")
    refuse(lambda: attribute_images(own), "labels.csv: no such file"); refuse(lambda: vispr(own), "no annotations")
    refuse(lambda: open_data("ucf101:"), "names no folder", UsageError)
    refuse(lambda: open_data(f"ucf1O1:{own}"), "did you mean 'ucf101'", UsageError)


@pytest.mark.parametrize("line", ["Run/v_Run_g01_c01.avi 1", "Walk/v_Walk_g02_c01.avi 1", "Walk/v_Walk_g02_c01.avi x", "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1"])
def test_wrong_split_lines(own, line):
    with open(own/LISTS/"trainlist01.txt", "a") as f: f.write(line + "\n")
    refuse(lambda: ucf101(own), "trainlist01.txt: line 13")


def test_wrong_class_list(own):
    for text in "Jump\nWalk\n", "0 Jump\n1 Walk\n", "1 Jump extra\n":
        (own/LISTS/"classInd.txt").write_text(text); refuse(lambda: ucf101(own), "classInd.txt: expected lines like")


def test_empty_classes_missing_clips_and_overlap(own):
    (own/"UCF-101/Walk/v_Walk_g02_c01.avi").unlink(); refuse(lambda: ucf101(own), "1 listed clips are missing, first Walk/v_Walk_g02_c01.avi")
    for p in (own/"UCF-101/Walk").iterdir(): p.unlink()
    refuse(lambda: ucf101(own), "class Walk is empty")
    (own/LISTS/"testlist01.txt").write_text((own/LISTS/"trainlist01.txt").read_text()); refuse(lambda: ucf101(own), "in train and in test")
    (own/LISTS/"testlist01.txt").write_text("\n"); refuse(lambda: ucf101(own), "testlist01.txt: no clip in it")


def test_a_class_of_damaged_clips_is_empty(own):
    for p in (own/"UCF-101/Walk").iterdir(): p.write_bytes(b"RIFF")
    refuse(lambda: ucf101(own), "class Walk is empty, no training clip is left")


def test_wrong_attribute_files(own, tmp_path):
    labels = tmp_path/"labels.csv"
    for text, why in (("file,face\nJump/v_Jump_g09_c01.avi,1\n", "1 labelled clips are in no split list"), ("face\n1\n", "no rows with column 'file'"), ("", "no rows"),
                      ("file,face\nJump/v_Jump_g01_c01.avi,yes\n", "no column holds only 0 and 1")):
        labels.write_text(text); refuse(lambda: ucf101(own, attributes=labels), f"labels.csv: .*{why}")
    refuse(lambda: ucf101(own, attributes=tmp_path/"none.pkl"), "none.pkl: no such attribute file")


# ---- pickles

class Runs:
    def __init__(self, how): self.how = how
    def __reduce__(self): return self.how


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_official_pickles_are_read(own, protocol):
    table = {f"{c}/v_{c}_g{g:02d}_c{k:02d}.mp4": np.array([[1, 0, k - 1, 0, 1]], dtype=np.int64) for c in ("Jump", "Walk") for g in (1, 2, 3, 4) for k in (1, 2)}
    (own/"vp.pickle").write_bytes(pickle.dumps(table, protocol))
    c = ucf101(own, attributes=own/"vp.pickle")
    assert c.attribute_names == VP_ATTRIBUTES and {r.attributes for r in c.train} == {(1, 0, 0, 0, 1), (1, 0, 1, 0, 1)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_runs(tmp_path, protocol):
    trap = tmp_path/"owned"
    for how in ((os.system, (f"touch {trap}",)), (eval, (f"open({str(trap)!r}, 'w')",)), (exec, (f"open({str(trap)!r}, 'w')",)), (open, (str(trap), "w")),
                (__import__, ("os",)), (getattr, ("", "join")), (np.save, (str(trap), np.zeros(1))), (Path.touch, (trap,)), (np.fromfile, (str(trap),))):
        for table in {"a/b.mp4": Runs(how)}, Runs(how), {"a/b.mp4": np.array([[Runs(how)]], dtype=object)}:
            (tmp_path/"evil.pkl").write_bytes(pickle.dumps(table, protocol))
            with pytest.raises(UserError, match="evil.pkl: not a VP label pickle.*only numpy arrays"): read_labels(tmp_path/"evil.pkl")
    assert not trap.exists() and not list(tmp_path.glob("owned*"))


def test_pickles_that_are_no_labels(tmp_path):
    for content in b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({"a/b": np.zeros((1, 6))}), pickle.dumps({"a/b": "text"}):
        (tmp_path/"x.pkl").write_bytes(content)
        with pytest.raises(UserError, match="x.pkl: "): read_labels(tmp_path/"x.pkl")


# ---- images

def images(root, rows, columns):
    for r in rows: (root/r[0]).parent.mkdir(parents=True, exist_ok=True); Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(root/r[0])
    with open(root/"labels.csv", "w", newline="") as f: csv.writer(f).writerows([columns, *rows])
    return root


def test_attribute_images(tmp_path):
    rows = [(f"{s}/{i}.jpg", s, "MF"[i % 2], "abc"[i % 3], i % 2, f"hash{s}{i}", "same") for s, n in (("train", 6), ("val", 3)) for i in range(n)]
    c = attribute_images(images(tmp_path, rows, ("file", "split", "gender", "race", "glasses", "sha256", "constant")))
    assert c.attribute_names == ("gender_M", "race_a", "race_b", "race_c", "glasses") and (len(c.train), len(c.test)) == (6, 3)
    assert c.train[1].attributes == (0, 0, 1, 0, 1) and c.kind == "frames" and c.train[0].action == -1
    (tmp_path/"train/2.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match="1 of 9"): assert attribute_images(tmp_path).excluded[0][0] == "train/2.jpg"
    (tmp_path/"train/2.jpg").unlink(); refuse(lambda: attribute_images(tmp_path), "1 labelled images are missing, first train/2.jpg")


def test_attribute_images_bad_split(tmp_path):
    refuse(lambda: attribute_images(images(tmp_path, [("a.jpg", "train", 1), ("b.jpg", "dev", 0)], ("file", "split", "x"))), "split 'dev'; use train, val or test")
    refuse(lambda: attribute_images(images(tmp_path, [("a.jpg", "train", 1), ("b.jpg", "train", 0)], ("file", "split", "x"))), "2 training and 0 test images")


def test_vispr_json_and_csv_agree(tmp_path):
    rows = [("train2017", f"2017_{i}", {"a4_gender", "a17_color"} if i % 2 else {"a0_safe"}) for i in range(4)] + [("val2017", "2017_8", set()), ("test2017", "2017_9", {"a9_face_complete"})]
    for root in tmp_path/"json", tmp_path/"csv":
        for part, name, labels in rows:
            (root/part).mkdir(parents=True, exist_ok=True); Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root/part/f"{name}.jpg")
            if root.name == "json": (root/part/f"{name}.json").write_text(json.dumps({"id": name, "labels": sorted(labels)}))
        (root/"attributes.tsv").write_text("idx\tattribute_id\n" + "".join(f"{i}\t{a}\n" for i, a in enumerate(("a0_safe", *VISPR1))))
    with open(tmp_path/"csv/vispr_labels.csv", "w", newline="") as f: csv.writer(f).writerows([("split", "id", "labels"), *((s, n, " ".join(sorted(l))) for s, n, l in rows)])
    a, b = vispr(tmp_path/"json"), vispr(tmp_path/"csv", None)
    assert a.attribute_names == VISPR1 == b.attribute_names and [r.attributes for r in a.train + a.test] == [r.attributes for r in b.train + b.test]
    assert len(a.train) == 4 and [r.name for r in a.test] == ["test2017/2017_9.jpg"] and a.test[0].attributes == tuple(float(x == "a9_face_complete") for x in VISPR1)
    (tmp_path/"json/test2017/2017_9.json").write_text("{}"); refuse(lambda: vispr(tmp_path/"json"), "2017_9.json: no VISPR annotation")


# ---- items

def epoch(data, **k): return torch.cat([b.get("clip", b.get("frame")) for b in DataLoader(data, batch_size=5, **k)])


def test_items_depend_on_seed_epoch_and_index_alone(ucf):
    c, how = ucf101(ucf, attributes="auto"), dict(size=16, seed=3)
    for make in lambda **k: ClipDataset(c.train, frames=4, **how, **k), lambda **k: FrameDataset(c.train, views=2, **how, **k):
        data = make(); one = epoch(data)
        assert torch.equal(one, epoch(data, num_workers=2)) and torch.equal(one, epoch(make(cache=True)))
        data.set_epoch(1); two = epoch(data)
        assert not torch.equal(one, two) and torch.equal(two, epoch(data, num_workers=2))
        how["seed"] = 4; assert not torch.equal(one, epoch(make())); how["seed"] = 3


def test_set_epoch_reaches_running_workers(ucf):
    data = ClipDataset(ucf101(ucf).train, frames=2, size=8)
    loader = DataLoader(data, batch_size=12, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["clip"]; data.set_epoch(5); second = next(iter(loader))["clip"]
    assert not torch.equal(first, second)
    data.set_epoch(0); assert torch.equal(next(iter(loader))["clip"], first)


def test_test_items_are_evenly_spaced_centre_crops(ucf):
    r = ucf101(ucf, attributes="auto").test[0]
    item = ClipDataset([r], frames=4, skip=2, size=16, train=False, views=3)[0]
    assert item["clip"].shape == (3, 3, 4, 16, 16) and item["name"] == r.name and item["index"] == 0 and item["action"] == 0
    raw = read_frames(r.path, sample_indices(r.frames, 4, 2, view=2, views=3), 20)
    assert torch.equal(item["clip"][2], datasets.test_clip(raw, 16, 0.8)) and item["attributes"].tolist() == list(r.attributes)
    frames = FrameDataset([r], size=16, train=False, views=4)[0]["frame"]
    assert frames.shape == (4, 3, 16, 16) and FrameDataset([r], size=16, train=False)[0]["frame"].shape == (3, 16, 16)
    want = read_frames(r.path, [int((v + 0.5) * r.frames / 4) for v in range(4)], 20)
    assert torch.equal(frames, datasets.test_clip(want, 16, 0.8).transpose(0, 1))


def test_flip_can_be_switched_off(tmp_path):
    ramp = torch.arange(0, 240, 5, dtype=torch.uint8).expand(8, 3, 32, 48)
    r = Record(write_video(tmp_path/"a.avi", ramp), "a.avi", frames=8)
    rising = lambda **k: [bool(d[0]["clip"].diff(dim=-1).mean() > 0) for d in [ClipDataset([r], frames=2, size=16, jitter=0, grey=0, erase=0, **k)] for e in range(40) if d.set_epoch(e) is None]
    assert all(rising(flip=False)) and 8 < sum(rising()) < 32


def test_memory_is_bounded(ucf, monkeypatch):
    c = ucf101(ucf); store = datasets.FrameStore(3 * 24 * 3 * 20 * 30)       # room for three or so
    monkeypatch.setattr(datasets, "STORE", store)
    with pytest.warns(UserWarning, match="do not fit in"): data = ClipDataset(c.train, frames=4, size=16, cache=True, seed=3)
    assert 0 < store.used <= store.limit and 0 < len(store.kept) < 12
    assert torch.equal(epoch(data), epoch(ClipDataset(c.train, frames=4, size=16, seed=3)))


@settings(max_examples=40, deadline=None)
@given(fraction=st.floats(0, 0.9), seed=st.integers(0, 99), classes=st.integers(1, 4), groups=st.integers(1, 9))
def test_groups_stay_together(fraction, seed, classes, groups):
    records = tuple(Record(Path("x"), f"C{a}/v_C{a}_g{g:02d}_c{k:02d}.avi", a) for a in range(classes) for g in range(groups) for k in (1, 2))
    train, held = split_holdout(records, fraction, seed)
    group = lambda rs: {(r.action, r.name[:-8]) for r in rs}
    assert sorted(r.name for r in train + held) == sorted(r.name for r in records) and not group(train) & group(held)
    assert {r.action for r in train} == set(range(classes))                  # no class is lost from training
    if fraction > 0 and groups > 1: assert {r.action for r in held} == set(range(classes))
    if fraction == 0: assert not held
    assert split_holdout(records[::-1], fraction, seed)[1][::-1] == held     # the order of the list does not matter


def test_holdout_of_photos():
    photos = tuple(Record(Path("x"), f"{i}.jpg") for i in range(100))
    train, held = split_holdout(photos, 0.2)
    assert (len(train), len(held)) == (80, 20)


def test_manifest_is_json_and_sees_changes(own):
    m = data_manifest(ucf101(own, attributes="auto"))
    assert json.loads(json.dumps(m)) == m and m["train"]["per_class"] == {"Jump": 6, "Walk": 6} and m["test"]["files"] == 4
    assert m["test"]["base_rates"] == {"skin_color": 1.0, "face": 1.0} and "Unused" not in m["classes"]
    write_video(own/"UCF-101/Jump/v_Jump_g02_c01.avi", torch.zeros(30, 3, 32, 32, dtype=torch.uint8))
    assert data_manifest(ucf101(own, attributes="auto"))["sha256"] != m["sha256"]


# ---- the real miniatures

@real
def test_real_ucf101():
    c = open_data(f"ucf101:{SHARED/'ucf101-mini'}")
    assert (len(c.train), len(c.test), len(c.classes)) == (210, 88, 10) and c.attribute_names == VP_ATTRIBUTES and not c.excluded
    counted = {r["file"]: int(r["frames_decoded"]) for r in csv.DictReader(open(SHARED/"ucf101-mini/clips.csv"))}
    assert {r.name: r.frames for r in c.train + c.test} == counted
    assert not any(np.isnan(r.attributes).any() for r in c.train) and all(f"_g0{g}_" not in r.name for r in c.train for g in range(1, 8))
    item = ClipDataset(c.train, size=32)[0]
    assert item["clip"].shape == (3, 16, 32, 32) and item["clip"].std() > 0.02
    for split in 2, 3: assert len(ucf101(SHARED/"ucf101-mini", split).classes) == 10


@real
def test_real_faces():
    c = open_data(f"images:{SHARED/'fairface-mini'}")
    assert (len(c.train), len(c.test)) == (2100, 699) and not c.excluded
    assert len(c.attribute_names) == 17 and "gender_Male" in c.attribute_names and "race_Indian" in c.attribute_names and "age_20-29" in c.attribute_names
    assert all(sum(r.attributes[:9]) == 1 and sum(r.attributes[10:]) == 1 for r in c.train)


@real
def test_real_vispr_labels(tmp_path):
    "The official labels of 22,167 photos, on stand-in images for a few of them."
    found = datasets._vispr_labels(SHARED/"vispr-annotations")
    known = datasets._vispr_vocabulary(SHARED/"vispr-annotations", found)
    assert len(found) == 22167 and len(known) == 67 and set(VISPR1 + datasets.VISPR2) <= set(known)
    assert [sum(s == p for s, _ in found.values()) for p in ("train2017", "val2017", "test2017")] == [10000, 4167, 8000]
    refuse(lambda: vispr(SHARED/"vispr-annotations"), "18000 labelled images are missing")
