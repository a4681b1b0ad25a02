"Data sets: every label checked, damaged files named, no pickle runs, items depend on (seed, epoch, index) alone."
import csv, json, os, pickle, shutil, warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from conftest import SHARED
from penaltyanon.data import datasets, records, sources, transforms
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.data.datasets import ClipDataset, FrameDataset
from penaltyanon.data.records import Record, VP_ATTRIBUTES, attributes_at, index_files, read_labels
from penaltyanon.data.sources import (SOURCES, VISPR1, VISPR2, attribute_images, data_manifest, hmdb51, open_data,
                                      pa_hmdb51, split_holdout, oracle_collection, ucf101, vispr)
from penaltyanon.data.layouts import HMDB_CLASSES, TITLES, write_layouts
from penaltyanon.data.video import read_frames, sample_indices, write_video

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


# ---- the other official layouts, in small

@pytest.fixture(scope="module")
def official(tmp_path_factory): return write_layouts(tmp_path_factory.mktemp("all")/"official")


@pytest.fixture
def hmdb(official, tmp_path): return Path(shutil.copytree(official/"hmdb51", tmp_path/"hmdb"))


@pytest.mark.parametrize("split", [1, 2, 3])
def test_hmdb51_with_names_as_people_type_them(official, split):
    c = open_data(f"hmdb51:{official/'hmdb51'}", split)
    assert c.classes == tuple(HMDB_CLASSES) == ("sway", "walk", "walk_aside", "wave")          # a class may begin like another
    assert (len(c.train), len(c.test)) == ((28, 8) if split < 3 else (28, 8)) and not c.excluded and c.attribute_names == VP_ATTRIBUTES
    assert {r.name.split("/")[1].split(f"_{r.name.split('/')[0]}_f")[0] for r in c.train + c.test} == set(TITLES)
    assert all(c.classes[r.action] == r.path.parent.name and r.frames == 24 and not np.isnan(r.attributes).any() for r in c.train + c.test)
    assert not {r.name for r in c.train} & {r.name for r in c.test}
    item = ClipDataset(c.test, frames=4, skip=2, size=16, train=False)[0]
    assert item["clip"].shape == (5, 3, 4, 16, 16) and item["clip"].std() > 0.02
    assert hmdb51(official/"hmdb51"/"hmdb51_org", split).test[0].attributes == ()                # only asked labels are read


def test_every_odd_character_in_a_file_name(tmp_path):
    names = [f"{'' if i % 2 else 'x'}{ch}y_{ch}_wave_f_nm_np1_fr_med_{i}.avi" for i, ch in enumerate("#!&()[]{}'`;,=+-_@%~^$ü.*?|<>\"\\")]
    names += ["..dots_wave_f_nm_np1_fr_med_0.avi", ".hidden_wave_f_nm_np1_fr_med_1.avi", "a.b.c_wave_f_nm_np1_fr_med_2.avi", "%05d_wave_f_nm_np1_fr_med_3.avi", "-_wave_f_nm_np1_fr_med_4.avi"]
    (tmp_path/"hmdb51_org/wave").mkdir(parents=True); (tmp_path/"testTrainMulti_7030_splits").mkdir()
    for n in names: write_video(tmp_path/"hmdb51_org/wave"/n, torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    (tmp_path/"testTrainMulti_7030_splits/wave_test_split1.txt").write_text("".join(f"{n} {1 + i % 2} \n" for i, n in enumerate(names)))
    (tmp_path/"hmdb51_privacy_attribute_label.pickle").write_bytes(pickle.dumps({f"wave/{n[:-4]}.mp4": np.array([[1, 0, 1, 0, i % 2]]) for i, n in enumerate(names)}))
    c = open_data(f"hmdb51:{tmp_path}")
    assert sorted(r.name for r in c.train + c.test) == sorted(f"wave/{n}" for n in names)
    assert all(r.attributes == (1, 0, 1, 0, 0) for r in c.train) and all(r.attributes == (1, 0, 1, 0, 1) for r in c.test)
    assert all(ClipDataset(c.train, frames=2, skip=1, size=8)[i]["clip"].shape == (3, 2, 8, 8) for i in range(len(c.train)))


@pytest.mark.parametrize("line", ["a_wave.avi", "a_wave.avi 3", "wave/a.avi 1", "1", " 1"])
def test_wrong_hmdb_lines(hmdb, line):
    with open(hmdb/"testTrainMulti_7030_splits/wave_test_split1.txt", "a") as f: f.write(line + "\n")
    refuse(lambda: hmdb51(hmdb), "wave_test_split1.txt: line 11 .* use the official split lists")


def test_a_clip_twice_in_a_list_and_clips_that_are_missing(hmdb):
    lists = hmdb/"testTrainMulti_7030_splits/wave_test_split1.txt"
    lines = lists.read_text().splitlines()
    lists.write_text("\n".join([*lines, lines[0]])); refuse(lambda: hmdb51(hmdb), "line 11")
    lists.write_text("\n".join(lines)); (hmdb/"hmdb51_org/wave"/lines[0].split(" ")[0]).unlink()
    refuse(lambda: hmdb51(hmdb), "1 listed clips are missing, first wave/#20_Rhythm_wave")
    shutil.rmtree(hmdb/"hmdb51_org/wave"); refuse(lambda: hmdb51(hmdb), "class wave is empty; unpack the whole archive")
    for p in (hmdb/"testTrainMulti_7030_splits").glob("*split2.txt"): p.unlink()
    refuse(lambda: hmdb51(hmdb, 2), "no list <class>_test_split2.txt; unpack HMDB51's official splits")
    shutil.rmtree(hmdb/"hmdb51_org"); refuse(lambda: hmdb51(hmdb), "give the folder that holds hmdb51_org")


@pytest.mark.parametrize("name,folder", [("vp-ucf101", "ucf101"), ("vp-hmdb51", "hmdb51")])
def test_vp_sets_need_their_labels(official, tmp_path, name, folder):
    c = open_data(f"{name}:{official/folder}")
    assert c.name == name and c.attribute_names == VP_ATTRIBUTES and not any(np.isnan(r.attributes).any() for r in c.train + c.test)
    own = Path(shutil.copytree(official/folder, tmp_path/folder))
    pickle_file = own/f"{folder}_privacy_attribute_label.pickle"; kept = pickle_file.rename(tmp_path/"labels.pickle")
    assert open_data(f"{folder}:{own}").attribute_names == ()
    refuse(lambda: open_data(f"{name}:{own}"), f"put {pickle_file.name} .*stprivacy")
    assert open_data(f"{name}:{own}", attributes=str(kept)).train[0].attributes == c.train[0].attributes
    other = official/("hmdb51" if folder == "ucf101" else "ucf101")
    refuse(lambda: open_data(f"{name}:{own}", attributes=str(next(other.glob("*.pickle")))), "labelled clips are in no split list")


def test_the_whole_pickle_serves_a_restricted_list(official, tmp_path):
    own = Path(shutil.copytree(official/"ucf101", tmp_path/"ucf"))
    for part in "train", "test":
        path = own/f"ucfTrainTestlist/{part}list01.txt"
        path.write_text("".join(l for l in path.read_text().splitlines(True) if not l.startswith("Kick")))
    c = open_data(f"vp-ucf101:{own}")
    assert c.classes == ("Clap", "Jump", "JumpingJack") and not any(np.isnan(r.attributes).any() for r in c.train + c.test)


def test_a_class_that_a_split_does_not_use_is_dropped(hmdb):
    lists = hmdb/"testTrainMulti_7030_splits/walk_test_split1.txt"
    lists.write_text("".join(f"{l.split(' ')[0]} 0 \n" for l in lists.read_text().splitlines()))
    c = hmdb51(hmdb)
    assert c.classes == ("sway", "walk_aside", "wave") and {r.action for r in c.train} == {0, 1, 2} and len(hmdb51(hmdb, 2).classes) == 4


# ---- PA-HMDB51

@pytest.mark.parametrize("split", [1, 2, 3])
def test_no_clip_of_pa_hmdb51_is_trained_on(official, split):
    "The published code trains on about half of its own test set; ours may never."
    pa, whole = open_data(f"pa-hmdb51:{official/'hmdb51'}", split), open_data(f"hmdb51:{official/'hmdb51'}", split)
    labelled = {f"{p.stem}/{n}" for p in (official/"hmdb51/PrivacyAttributes").glob("*.json") for n in json.loads(p.read_text())}
    assert {r.name for r in pa.test} == labelled and len(labelled) == 12
    assert {r.name for r in pa.train} == {r.name for r in whole.train} - labelled
    assert {r.name for r in whole.train} & labelled                                          # or there would be nothing to take out
    assert pa.attribute_names == VP_ATTRIBUTES and pa.classes == whole.classes and not any(np.isnan(r.attributes).any() for r in pa.train)


def test_frame_labels_reach_single_frames_and_video_labels_the_rest(official):
    c = open_data(f"pa-hmdb51:{official/'hmdb51'}")
    face = VP_ATTRIBUTES.index("face")
    r = next(r for r in c.test if attributes_at(r, 0)[face] != attributes_at(r, r.frames - 1)[face])
    assert [attributes_at(r, f)[face] for f in (0, 11, 12, 23)] == [1, 1, 0, 0] and r.attributes[face] == 1
    assert FrameDataset([r], size=16, train=False)[0]["attributes"][face] == 0                # the middle frame, 12
    assert FrameDataset([r], size=16, train=False, views=4)[0]["attributes"][face] == 1
    assert ClipDataset([r], frames=4, size=16, train=False)[0]["attributes"][face] == 1
    data, seen = FrameDataset([r], size=16, jitter=0, grey=0, erase=0), set()
    for e in range(20): data.set_epoch(e); seen.add(float(data[0]["attributes"][face]))
    assert seen == {0, 1}                                                                    # drawn frames carry their own labels


@pytest.mark.parametrize("last,fits", [(23, True), (24, True), (25, True), (26, False), (21, True), (20, False), (407, False)])
def test_frame_labels_stay_only_where_they_fit(hmdb, last, fits):
    file = next((hmdb/"PrivacyAttributes").glob("wave.json"))
    clip = next(iter(json.loads(file.read_text())))
    file.write_text(json.dumps({clip: {"face": [[0, 9, 0], [10, last, 1]]}}))
    r = {r.name: r for r in pa_hmdb51(hmdb).test}[f"wave/{clip}"]
    assert bool(r.spans) == fits and r.attributes[1] == 1 and np.isnan(r.attributes[0])       # 24 frames decode


def test_pa_hmdb51_in_one_file_and_wrong_ones(hmdb):
    read = lambda: pa_hmdb51(hmdb, attributes="auto")
    want = read()
    one = {f"{p.stem}/{n}": v for p in (hmdb/"PrivacyAttributes").glob("*.json") for n, v in json.loads(p.read_text()).items()}
    shutil.rmtree(hmdb/"PrivacyAttributes"); refuse(lambda: pa_hmdb51(hmdb), "PrivacyAttributes: no such file or folder")
    (hmdb/"pa_hmdb51_segments.json").write_text(json.dumps(one)); assert read() == want
    (hmdb/"pa_hmdb51_segments.json").write_text(json.dumps(one | {"wave/of_another_set.avi": {"face": [[0, 1, 1]]}}))
    with pytest.warns(UserWarning, match="1 clips of PA-HMDB51 are in none of HMDB51's lists, first wave/of_another_set.avi"): assert read() == want
    for text, why in (("{", "not valid JSON"), ("[1]", "not PA-HMDB51's labels"), ('{"wave/a.avi": {"face": [[0, 5]]}}', "not PA-HMDB51's labels"),
                      ('{"wave/a.avi": {"face": [[0, 5, "x"]]}}', "not PA-HMDB51's labels"), ('{"wave/a.avi": {}}', "no clip with a labelled frame"),
                      ('{"wave/a.avi": {"face": [[0, 5, 1]]}}', "no labelled clip is in HMDB51's lists")):
        (hmdb/"pa_hmdb51_segments.json").write_text(text); refuse(lambda: pa_hmdb51(hmdb), why)


# ---- names of data sets

def test_vispr_pa_asks_what_pa_hmdb51_asks(official):
    c, whole = open_data(f"vispr-pa:{official/'vispr'}"), {r.name: r.attributes for r in open_data(f"vispr1:{official/'vispr'}").train}
    assert c.attribute_names == open_data(f"pa-hmdb51:{official/'hmdb51'}").attribute_names
    for r in c.train:
        v = dict(zip(VISPR1, whole[r.name]))
        assert r.attributes == (v["a17_color"], max(v["a9_face_complete"], v["a10_face_partial"]), v["a4_gender"], v["a12_semi_nudity"], max(v["a64_rel_personal"], v["a65_rel_social"]))


def test_columns_of_attribute_images(official):
    names = lambda spec: open_data(f"{spec}:{official/'images'}").attribute_names
    assert names("images@gender") == ("gender_Male",) and names("images@age,gender") == ("age_0-2", "age_20-29", "age_more than 70", "gender_Male")
    assert set(names("images@race")) | set(names("images@age,gender")) == set(names("images")) and not set(names("images@race")) & set(names("images@age,gender"))
    refuse(lambda: names("images@gendr"), "no column 'gendr' .*did you mean 'gender'", UsageError)
    refuse(lambda: names("images@file"), "no attribute column")
    refuse(lambda: names("vispr1@race"), "only images have columns", UsageError)


def test_oracle_sets():
    for variant in "", "-b":
        assert oracle_collection(f"puppets{variant}:/d:e") == f"puppets{variant}-oracle:/d:e" and oracle_collection(f"puppets{variant}-images:~/d") == f"puppets{variant}-oracle-images:~/d"
    assert {oracle_collection(f"{n}:x").partition(":")[0] for n in SOURCES if n.startswith("puppets") and "oracle" not in n} < set(SOURCES)
    for spec in "ucf101:d", "puppets-oracle:d", "puppets-c:d", "puppets", "puppets:", "images@a:d": refuse(lambda: oracle_collection(spec), "no oracle set", UsageError)


# ---- damage

def test_damaged_files_are_left_out_by_name(own):
    bad = own/"UCF-101/Jump/v_Jump_g02_c01.avi"; bad.write_bytes(bad.read_bytes()[:4000])
    with pytest.warns(UserWarning, match="1 of 16 files left out as damaged: Jump/v_Jump_g02_c01.avi"): c = ucf101(own)
    assert [n for n, _ in c.excluded] == ["Jump/v_Jump_g02_c01.avi"] and len(c.train) == 11
    assert data_manifest(c)["excluded"][0][0] == "Jump/v_Jump_g02_c01.avi"
    for item in ClipDataset(c.train, frames=4, size=16): assert item["clip"].shape == (3, 4, 16, 16)       # never inside an epoch


def test_files_are_decoded_once_and_again_when_they_change(own, monkeypatch):
    names, seen = ["Jump/v_Jump_g01_c01.avi", "Walk/v_Walk_g01_c01.avi"], []
    probe = records._probe_file
    monkeypatch.setattr(records, "_probe_file", lambda p: (seen.append(p.name), probe(p))[1])
    assert index_files(own/"UCF-101", names) == index_files(own/"UCF-101", names) and len(seen) == 2
    write_video(own/"UCF-101"/names[0], torch.zeros(7, 3, 32, 32, dtype=torch.uint8))
    assert index_files(own/"UCF-101", names)[0] == {names[0]: 7, names[1]: 21} and len(seen) == 3
    for broken in "", "[]", "{\"Jump/v_Jump_g01_c01.avi\": 3}", "{\"Jump/v_Jump_g01_c01.avi\": []}":
        records._cache_file(own/"UCF-101", "index").write_text(broken)               # a spoiled index costs time, nothing else
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
    assert torch.equal(item["clip"][2], transforms.center_clip(raw, 16, 0.8)) and item["attributes"].tolist() == list(r.attributes)
    frames = FrameDataset([r], size=16, train=False, views=4)[0]["frame"]
    assert frames.shape == (4, 3, 16, 16) and FrameDataset([r], size=16, train=False)[0]["frame"].shape == (3, 16, 16)
    want = read_frames(r.path, [int((v + 0.5) * r.frames / 4) for v in range(4)], 20)
    assert torch.equal(frames, transforms.center_clip(want, 16, 0.8).transpose(0, 1))


def test_flip_can_be_switched_off(tmp_path):
    ramp = torch.arange(0, 240, 5, dtype=torch.uint8).expand(8, 3, 32, 48)
    r = Record(write_video(tmp_path/"a.avi", ramp), "a.avi", frames=8)
    rising = lambda **k: [bool(d[0]["clip"].diff(dim=-1).mean() > 0) for d in [ClipDataset([r], frames=2, size=16, jitter=0, grey=0, erase=0, **k)] for e in range(40) if d.set_epoch(e) is None]
    assert all(rising(flip=False)) and 8 < sum(rising()) < 32


def test_memory_is_bounded(ucf, monkeypatch):
    c = ucf101(ucf); store = datasets.FrameStore(3 * 24 * 3 * 20 * 30)       # room for three or so
    monkeypatch.setattr(datasets, "FRAME_STORE", store)
    with pytest.warns(UserWarning, match="do not fit in"): data = ClipDataset(c.train, frames=4, size=16, cache=True, seed=3)
    assert 0 < store.used <= store.limit and 0 < len(store.decoded) < 12
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
    clip = own/"UCF-101/Jump/v_Jump_g02_c01.avi"
    data = clip.read_bytes()
    tail = bytes([data[-1] ^ 1])
    clip.write_bytes(data[:-1] + tail)                                      # one bit, the same size, still decodes
    changed = data_manifest(ucf101(own, attributes="auto"))
    differ = [a[0] for part in ("train", "test") for a, b in zip(m["files"][part], changed["files"][part]) if a != b]
    assert changed["sha256"] != m["sha256"] and differ == ["Jump/v_Jump_g02_c01.avi"]
    clip.write_bytes(data)
    assert data_manifest(ucf101(own, attributes="auto")) == m
    record = ucf101(own, attributes="auto").train[0]
    c = ucf101(own, attributes="auto")
    other = replace(c, train=(replace(record, attributes=tuple(1 - a for a in record.attributes)), *c.train[1:]))
    assert data_manifest(other)["sha256"] != m["sha256"], "a label that changed"


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


hmdb_mini = pytest.mark.skipif(not (SHARED/"hmdb51-mini").is_dir(), reason=f"no real data under {SHARED}; set PENALTYANON_SHARED")


@hmdb_mini
def test_real_hmdb51():
    rows = {r["file"]: r for r in csv.DictReader(open(SHARED/"hmdb51-mini/clips.csv"))}
    c = open_data(f"vp-hmdb51:{SHARED/'hmdb51-mini'}")
    assert c.classes == ("brush_hair", "golf", "pullup", "walk", "wave") and (len(c.train), len(c.test)) == (100, 49) and not c.excluded
    assert {r.name: r.frames for r in c.train + c.test} == {n: int(r["frames_decoded"]) for n, r in rows.items()}
    assert {r.name for r in c.test} == {n for n, r in rows.items() if r["split1"] == "test"} and any(set(r.name) & set("#!()") for r in c.train + c.test)
    assert c.attribute_names == VP_ATTRIBUTES and not any(np.isnan(r.attributes).any() for r in c.train + c.test)
    c = hmdb51(SHARED/"hmdb51-mini", 3)
    assert (len(c.train), len(c.test)) == (82, 37)
    refuse(lambda: hmdb51(SHARED/"hmdb51-mini", 2), "class walk is empty, no training clip is left")     # of the few clips here split 2 trains on none


@hmdb_mini
def test_real_short_clips_are_played_in_a_loop():
    c = hmdb51(SHARED/"hmdb51-mini")
    r = min(c.train, key=lambda r: r.frames)
    assert r.frames < 16 * 4
    item = ClipDataset([r], size=24)[0]
    assert item["clip"].shape == (3, 16, 24, 24) and item["clip"].std() > 0.02
    views = ClipDataset([r], size=24, train=False)[0]["clip"]
    assert views.shape == (5, 3, 16, 24, 24) and torch.equal(views[0], views[4])                # there is one start


@hmdb_mini
def test_real_pa_hmdb51():
    truth = json.loads((SHARED/"hmdb51-mini/pa_hmdb51_segments.json").read_text())
    for split in 3, 1:
        c = open_data(f"pa-hmdb51:{SHARED/'hmdb51-mini'}", split)
        assert {r.name for r in c.test} == set(truth) and len(truth) == 21 and not {r.name for r in c.train} & set(truth)
    levels = {"skin_color": 1, "face": 1, "gender": 1, "nudity": 2, "relationship": 1}
    for r in c.test:                                                                          # trimmed clips: labels of the video alone
        assert r.spans == () and r.attributes == tuple(float(max(np.max(v) for _, _, v in truth[r.name][a]) >= levels[a]) for a in VP_ATTRIBUTES)
    vp = {r.name: r.attributes for s in (hmdb51(SHARED/"hmdb51-mini", attributes="auto"),) for r in s.train + s.test}
    agree = np.array([[p == v for v in vp[r.name] for p in r.attributes] for r in c.test]).reshape(-1, 5, 5).mean(0)      # VP column, PA attribute
    assert agree[1, 1] > 0.7 and agree[1, 1] > agree[0, 1] and agree[3, 3] > 0.8               # face is column 1 of the VP labels, not column 0


@real
def test_real_faces():
    c = open_data(f"images:{SHARED/'fairface-mini'}")
    assert (len(c.train), len(c.test)) == (2100, 699) and not c.excluded
    assert len(c.attribute_names) == 17 and "gender_Male" in c.attribute_names and "race_Indian" in c.attribute_names and "age_20-29" in c.attribute_names
    assert all(sum(r.attributes[:9]) == 1 and sum(r.attributes[10:]) == 1 for r in c.train)


@real
def test_real_vispr_labels(tmp_path):
    "The official labels of 22,167 photos, on stand-in images for a few of them."
    found = sources._read_vispr_labels(SHARED/"vispr-annotations")
    known = sources._vispr_attribute_names(SHARED/"vispr-annotations", found)
    assert len(found) == 22167 and len(known) == 67 and set(VISPR1 + sources.VISPR2) <= set(known)
    assert [sum(s == p for s, _ in found.values()) for p in ("train2017", "val2017", "test2017")] == [10000, 4167, 8000]
    refuse(lambda: vispr(SHARED/"vispr-annotations"), "18000 labelled images are missing")


@pytest.mark.skipif(not (SHARED/"vispr-annotations").is_dir(), reason=f"no real data under {SHARED}; set PENALTYANON_SHARED")
def test_real_vispr_matrices(tmp_path, monkeypatch):
    "VISPR1, VISPR2 and the five PA-HMDB51 questions: every cell of our label matrices against the official table."
    rows = {r["id"]: (r["split"], r["labels"].split(" ")) for r in csv.DictReader(open(SHARED/"vispr-annotations/vispr_labels.csv"))}
    for part in "train2017", "val2017", "test2017": (tmp_path/part).mkdir()
    for i, (part, _) in rows.items(): (tmp_path/part/f"{i}.jpg").touch()                        # we have the labels, not the photos
    for f in "vispr_labels.csv", "attributes.tsv": shutil.copy(SHARED/"vispr-annotations"/f, tmp_path)
    monkeypatch.setattr(sources, "index_files", lambda root, names: (dict.fromkeys(names, 1), ()))
    either = {"skin_color": {"a17_color"}, "face": {"a9_face_complete", "a10_face_partial"}, "gender": {"a4_gender"}, "nudity": {"a12_semi_nudity"},
              "relationship": {"a64_rel_personal", "a65_rel_social"}}
    for asked, columns in (VISPR1, [{a} for a in VISPR1]), (VISPR2, [{a} for a in VISPR2]), (sources.VISPR_PA, list(either.values())):
        names, items = sources._read_vispr_rows(tmp_path, asked)
        want = {i: (part, tuple(float(not x.isdisjoint(labels)) for x in columns)) for i, (part, labels) in rows.items()}
        assert names == tuple(asked) and {Path(f).stem: (f"{part}2017", v) for f, part, v in items} == want and len(items) == 22167
        assert all(0.001 < rate < 0.9 for rate in np.mean([v for *_, v in items], 0))
    assert tuple(sources.VISPR_PA) == VP_ATTRIBUTES == tuple(either)
    c = open_data(f"vispr-pa:{tmp_path}")
    assert (len(c.train), len(c.test)) == (10000, 8000) and c.attribute_names == VP_ATTRIBUTES
    assert all(r.attributes == want[r.path.stem][1] and r.path.parent.name == want[r.path.stem][0] for r in c.train + c.test)
