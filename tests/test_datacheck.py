"The check of a data folder: every missing and damaged file is named, official counts are compared, nothing is written unasked."
import pickle, shutil
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import SHARED
from penaltyanon.cli import main
from penaltyanon.core.files import UsageError
from penaltyanon.data.check import DATASET_FACTS, base_rates, check_data, dataset_facts
from penaltyanon.data.sources import SOURCES
from penaltyanon.data.layouts import write_layouts
from penaltyanon.data.records import read_labels

real = lambda folder: pytest.mark.skipif(not (SHARED/folder).is_dir(), reason=f"no real data under {SHARED}; set PENALTYANON_SHARED")
SPECS = {"ucf101": "ucf101", "vp-ucf101": "ucf101", "hmdb51": "hmdb51", "vp-hmdb51": "hmdb51", "pa-hmdb51": "hmdb51", "vispr1": "vispr", "vispr2": "vispr", "vispr-pa": "vispr"}


@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_layouts(tmp_path_factory.mktemp("check")/"official", size=32, frames=6, images=(12, 4, 8))


@pytest.fixture
def own(root, tmp_path): return Path(shutil.copytree(root, tmp_path/"own"))


def official(monkeypatch, name, root):
    "Make the generated set's own counts the official ones."
    from penaltyanon.data.check import DatasetFacts, read_contents
    counts = read_contents(name, root).counts
    for key, facts in DATASET_FACTS.items(): monkeypatch.setitem(DATASET_FACTS, key, DatasetFacts(facts.title, {k: counts[k] for k in facts.counts if k in counts}, facts.get, facts.terms))


@pytest.mark.parametrize("name", SPECS)
def test_complete_when_all_counts_are_met(root, name, monkeypatch):
    few = check_data(name, root/SPECS[name])
    assert not few.complete and not few.missing and not few.damaged and "NOT COMPLETE" in few.text and "differs" in few.text
    official(monkeypatch, name, root/SPECS[name])
    whole = check_data(name, root/SPECS[name])
    assert whole.complete and "NOT" not in whole.text and "differs" not in whole.text, whole.text
    for facts in dataset_facts(name): assert facts.terms.split(";")[0][:20] in whole.text
    assert len(whole.text.splitlines()) < 70 and max(map(len, whole.text.splitlines()[1:])) <= 120               # one page


@pytest.mark.parametrize("name", ["ucf101", "hmdb51", "pa-hmdb51", "vispr1"])
def test_every_missing_and_damaged_file_is_named(own, name, monkeypatch):
    folder = own/SPECS[name]
    official(monkeypatch, name, folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".avi", ".jpg"))
    gone, cut = [files[0], files[7]], [files[3], files[9], files[-1]]
    for p in gone: p.unlink()
    for p in cut: p.write_bytes(p.read_bytes()[:200])
    found = check_data(name, folder)
    short = lambda paths: {"/".join(p.parts[-2:]) for p in paths}
    assert not found.complete and set(found.missing) == short(gone) and {n for n, _ in found.damaged} == short(cut)
    assert "missing files: 2" in found.text and "damaged files: 3" in found.text and all(n in found.text for n in short(gone + cut))


def test_many_missing_files_stay_on_a_page(own):
    for p in (own/"ucf101/UCF-101").rglob("*.avi"): p.unlink()
    found = check_data("ucf101", own/"ucf101")
    assert len(found.missing) == 40 and "and 35 more" in found.text and len(found.text.splitlines()) < 60


def test_clips_that_the_pickle_forgot(own):
    names, labels = read_labels(own/"ucf101/ucf101_privacy_attribute_label.pickle")
    labels.pop("Clap/v_Clap_g01_c01")
    (own/"ucf101/ucf101_privacy_attribute_label.pickle").write_bytes(pickle.dumps({f"{n}.mp4": np.array([v]) for n, v in labels.items()}))
    for name, how in ("vp-ucf101", "wrong"), ("ucf101", "note"):
        assert f"{how}: 1 listed clips have no label in ucf101_privacy_attribute_label.pickle, first Clap/v_Clap_g01_c01.avi" in check_data(name, own/"ucf101").text


def test_what_lists_and_labels_lack(own):
    (own/"ucf101/ucfTrainTestlist/testlist03.txt").unlink(); (own/"ucf101/ucf101_privacy_attribute_label.pickle").unlink()
    page = check_data("vp-ucf101", own/"ucf101").text
    assert "wrong: " in page and "testlist03.txt: no such split list" in page and "wrong: no attribute labels" in page
    assert "note: no attribute labels" in check_data("ucf101", own/"ucf101").text
    (own/"hmdb51/hmdb51_org/wave/of_my_own.avi").write_bytes(b"x")
    assert "note: 1 video files are in no list" in check_data("pa-hmdb51", own/"hmdb51").text
    shutil.rmtree(own/"hmdb51/PrivacyAttributes")
    nothing = check_data("pa-hmdb51", own/"hmdb51")
    assert not nothing.complete and "VITA-Group/PA-HMDB51" in nothing.text and "non-commercial" in nothing.text


@pytest.mark.parametrize("name", SOURCES)
def test_without_any_data_the_page_says_where_to_get_them(name, tmp_path):
    found = check_data(name, tmp_path/"nowhere")
    assert not found.complete and "no such data folder" in found.text
    assert any(word in found.text for word in ("https://", "penaltyanon puppets")) and "terms:" in found.text


def test_unlabelled_and_constant_attributes(own):
    assert np.isnan(base_rates([(float("nan"), 1), (float("nan"), 0)])[0]) and base_rates([(0, 1), (1, 1), (float("nan"), 1)]) == [0.5, 1]
    page = check_data("images", own/"images")
    assert page.complete and "race_Light" in page.text and "clips of a class" not in page.text
    rows = (own/"images/labels.csv").read_text().replace("Dark", "Light").replace("Light", "Dark", 1)
    (own/"images/labels.csv").write_text(rows)
    assert "nearly constant" in check_data("images@race", own/"images").text


def test_generated_data(tmp_path):
    from penaltyanon.data.puppets import write_puppets
    root = write_puppets(tmp_path/"p", train=8, test=8, images=(3, 2), size=32, frames=4, workers=1, progress=False)
    for name in "puppets", "puppets-images", "puppets-oracle", "puppets-oracle-images": assert check_data(name, root).complete, name
    (root/"oracle/vispr/test2017").joinpath(next((root/"oracle/vispr/test2017").glob("*.png")).name).unlink()
    assert check_data("puppets-images", root).complete and len(check_data("puppets-oracle-images", root).missing) == 1


# ---- the sheet

def test_a_sheet_only_where_asked_and_never_in_the_data(root, tmp_path):
    before = {p for p in root.rglob("*")}
    found = check_data("ucf101", root/"ucf101", sheet=tmp_path/"new/sheet.png")
    picture = np.asarray(Image.open(tmp_path/"new/sheet.png"))
    assert picture.shape == (5 * 108, 8 * 96, 3) and picture.std() > 20 and "may show people" in found.text
    for where in root/"ucf101/sheet.png", root/"ucf101/UCF-101/Clap/sheet.png", root/"ucf101/../ucf101/x.png", root/"ucf101/UCF-101.png":
        for data in root/"ucf101", root/"ucf101/UCF-101":
            with pytest.raises(UsageError, match="lies in the data folder"): check_data("ucf101", data, sheet=where)
    (tmp_path/"link").symlink_to(root/"ucf101")
    with pytest.raises(UsageError, match="lies in the data folder"): check_data("ucf101", root/"ucf101", sheet=tmp_path/"link/sheet.png")
    with pytest.raises(UsageError, match="ends in .png"): check_data("ucf101", root/"ucf101", sheet=tmp_path/"sheet.jpg")
    assert {p for p in root.rglob("*")} == before                                            # nothing was written among the data


def test_a_sheet_of_a_damaged_set(own, tmp_path):
    for p in sorted((own/"images").rglob("*.jpg"))[1:]: p.write_bytes(b"no image")
    assert check_data("images", own/"images", sheet=tmp_path/"one.png").damaged and Image.open(tmp_path/"one.png").size == (768, 108)
    for p in (own/"images").rglob("*.jpg"): p.write_bytes(b"no image")
    assert "nothing to show" in check_data("images", own/"images", sheet=tmp_path/"none.png").text and not (tmp_path/"none.png").exists()


# ---- the command

def test_the_command_and_its_exit_codes(root, tmp_path, capsys):
    def command(*args):
        with pytest.raises(SystemExit) as e: main(["data", "check", *map(str, args)])
        return e.value.code, *capsys.readouterr()
    code, out, _ = command("images", root/"images", "--sheet", tmp_path/"s.png")
    assert code == 0 and ": complete" in out.splitlines()[0] and (tmp_path/"s.png").is_file()
    code, out, _ = command("hmdb51", root/"hmdb51", "--split", 2)
    assert code == 1 and "NOT COMPLETE" in out and "split 2" in out.splitlines()[0]
    code, out, err = command("hmbd51", root/"hmdb51")
    assert code == 2 and "did you mean 'hmdb51'" in err and not out
    assert command("hmdb51", root/"hmdb51", "--split", 4)[0] == 2 and command("hmdb51")[0] == 2


# ---- the real miniatures and the real labels

@real("vispr-annotations")
def test_official_counts_of_vispr():
    found = check_data("vispr1", SHARED/"vispr-annotations")
    assert len(found.missing) == 22167 and "differs" not in found.text and not found.complete                      # all labels, no photo
    assert [l.split()[1:] for l in found.text.splitlines() if l.startswith("images ")] == [["22167", "22167"]]


@real("ucf101-mini")
@pytest.mark.parametrize("name,folder,clips", [("vp-ucf101", "ucf101-mini", 298), ("vp-hmdb51", "hmdb51-mini", 149), ("pa-hmdb51", "hmdb51-mini", 149)])
def test_the_miniatures_are_whole_but_small(name, folder, clips):
    found = check_data(name, SHARED/folder)
    assert not found.missing and not found.damaged and "wrong:" not in found.text and "in no list" not in found.text
    assert [l.split()[1] for l in found.text.splitlines() if l.startswith("clips ")] == [str(clips)]
    assert "skin_color" in found.text and "nearly constant" in found.text
