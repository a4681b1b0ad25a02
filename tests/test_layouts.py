"Generated data in the official layouts: the same bytes for a seed, complete or not there, everything a loader may ask for."
import hashlib, json
import numpy as np, pytest
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.data.sources import VISPR1, VISPR2, open_data
from penaltyanon.data.layouts import HMDB_CLASSES, UCF_CLASSES, write_layouts
from penaltyanon.data.records import read_frame_labels, read_labels

SMALL = dict(groups=4, images=(6, 2, 4), size=32, frames=6)
SPECS = {"ucf101": "ucf101", "vp-ucf101": "ucf101", "hmdb51": "hmdb51", "vp-hmdb51": "hmdb51", "pa-hmdb51": "hmdb51", "vispr1": "vispr",
         "vispr2": "vispr", "vispr-pa": "vispr", "images": "images", "images@race": "images", "images@age,gender": "images"}


@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_layouts(tmp_path_factory.mktemp("layouts")/"a", **SMALL)


def digest(root): return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    assert digest(write_layouts(tmp_path/"b", **SMALL)) == digest(root)
    other = digest(write_layouts(tmp_path/"c", seed=1, **SMALL))
    assert other.keys() == digest(root).keys()
    same = [f for f, d in digest(root).items() if other[f] == d and f.endswith((".avi", ".jpg", ".pickle"))]
    assert not same


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("split", [1, 2, 3])
def test_every_set_opens(root, name, split):
    c = open_data(f"{name}:{root/SPECS[name]}", split)
    assert c.train and c.test and not c.excluded and c.attribute_names and not {r.name for r in c.train} & {r.name for r in c.test}
    if c.kind == "clips": assert {r.action for r in c.train} == set(range(len(c.classes))) and all(r.frames == 6 for r in c.train)


def test_default_sizes_let_every_attribute_be_measured(tmp_path):
    root = write_layouts(tmp_path/"official")
    for name, folder in SPECS.items():
        c = open_data(f"{name}:{root/folder}")
        for part in c.train, c.test: assert (np.ptp([r.attributes for r in part], axis=0) == 1).all(), name


def test_actions_of_the_two_video_sets_differ(): assert not set(UCF_CLASSES.values()) & set(HMDB_CLASSES.values())


def test_files_are_what_the_archives_have(root):
    assert sorted(p.name for p in root.iterdir()) == ["hmdb51", "images", "layouts.json", "ucf101", "vispr"]
    assert sorted(p.name for p in (root/"ucf101/ucfTrainTestlist").iterdir()) == ["classInd.txt"] + [f"{p}list0{s}.txt" for p in ("test", "train") for s in (1, 2, 3)]
    assert (root/"ucf101/ucfTrainTestlist/trainlist02.txt").read_text().startswith("Clap/v_Clap_g01_c01.avi 1\n")
    assert len(list((root/"hmdb51/testTrainMulti_7030_splits").iterdir())) == 3 * len(HMDB_CLASSES)
    assert all(line.split(" ")[1] in "012" and line.endswith(" ") for line in (root/"hmdb51/testTrainMulti_7030_splits/wave_test_split1.txt").read_text().splitlines())
    for kind, n in ("ucf101", 32), ("hmdb51", 40): assert len(read_labels(root/kind/f"{kind}_privacy_attribute_label.pickle")[1]) == n
    assert len(read_frame_labels(root/"hmdb51/PrivacyAttributes")) == 12
    note = json.loads(next((root/"vispr/annotations/train2017").glob("*.json")).read_text())
    assert set(note) == {"id", "image_path", "labels"} and set(note["labels"]) <= {*VISPR1, *VISPR2, "a0_safe"}


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    from penaltyanon.data import layouts
    monkeypatch.setattr(layouts, "_write_images", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): write_layouts(tmp_path/"x", **SMALL)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(root, tmp_path):
    before = digest(root)
    assert write_layouts(root, **SMALL) == root and digest(root) == before
    with pytest.raises(UserError, match="exists and holds something else"): write_layouts(root, seed=2, **SMALL)
    (tmp_path/"mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="exists and holds something else"): write_layouts(tmp_path, **SMALL)
    assert (tmp_path/"mine.txt").read_text() == "keep me"
    (tmp_path/"empty").mkdir(); assert write_layouts(tmp_path/"empty", **SMALL).is_dir()


@pytest.mark.parametrize("bad", [dict(groups=3), dict(images=(1, 0, 1)), dict(seed=-1), dict(size=30), dict(size=33), dict(frames=1)])
def test_what_cannot_be_made_is_refused(tmp_path, bad):
    with pytest.raises(UsageError, match=f"layouts: {next(iter(bad))} = "): write_layouts(tmp_path/"x", **bad)
    assert not (tmp_path/"x").exists()


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="sise"): write_layouts(tmp_path/"x", sise=64)
    assert not list(tmp_path.iterdir())
