"Leakage measured on the same videos: exact chance levels, what black and raw are worth, one command over methods and runs."
import numpy as np, pytest
from conftest import SHARED
from test_cli import call
from penaltyanon.core.files import read_json
from penaltyanon.data.sources import open_data
from penaltyanon.evaluate import linkage, measures
from penaltyanon.results.leakage import leakage_table, load_measures

real = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason=f"no real data under {SHARED}; set PENALTYANON_SHARED")


@pytest.fixture(scope="module")
def clips(): return {split: measures.record_facts(open_data(f"ucf101:{SHARED}/ucf101-mini", split), "test") for split in (1, 2, 3)}


@real
def test_chance_and_detectable_difference_of_the_real_sets_are_counted(clips):
    "Queries, chance in percent and detectable difference in points, in one fold and in three."
    def counted(tasks):
        n = [int(linkage.link_queries(t).sum()) for t in tasks]
        return sum(n), 100*sum(linkage.link_chance(t)*k for t, k in zip(tasks, n))/sum(n), measures.detectable_hits(sum(n))
    faces = len(open_data(f"images@race:{SHARED}/fairface-mini").test)
    assert counted([linkage.link_all(faces)]) == pytest.approx((699, 0.143, 5.8), abs=.1)
    everything = [linkage.link_all(len(f.classes)) for f in clips.values()]
    assert counted(everything[:1]) == pytest.approx((88, 1.14, 16.4), abs=.1) and counted(everything)[0] == 249
    within = [linkage.link_within(f.classes) for f in clips.values()]
    assert counted(within[:1]) == pytest.approx((88, 11.4, 16.4), abs=.5) and counted(within)[::2] == pytest.approx((249, 9.7), abs=.1)
    recordings = [linkage.link_recordings(f.classes, f.groups) for f in clips.values()]
    assert counted(recordings[:1]) == pytest.approx((48, 16, 22.2), abs=.6) and counted(recordings) == pytest.approx((112, 15, 14.5), abs=.6)


@real
def test_pairs_of_one_class_are_counted(clips):
    "Attributes given the action: face, nudity and relationship decide 374 pairs of split 1."
    from penaltyanon.evaluate.intervals import count_pairs, unmeasurable_attributes
    names = ("skin_color", "face", "gender", "nudity", "relationship")
    f = clips[1]
    left_out = unmeasurable_attributes(f.attributes, f.classes, names)
    assert set(left_out) == {"skin_color", "gender"}
    assert sum(count_pairs(y, f.classes) for name, y in zip(names, f.attributes.T) if name not in left_out) == 374


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "`penaltyanon measure` on puppets: raw, black, and black on a raw frame's memory (blackening)."
    from penaltyanon.data.puppets import write_puppets
    root = tmp_path_factory.mktemp("measures")
    write_puppets(root/"puppets", progress=False, train=48, test=24, images=(64, 32), size=32)
    data = [f"action_data=puppets:{root}/puppets", f"privacy_data=puppets-images:{root}/puppets"]
    r = call("measure", "raw", "blackening", "--preset", "smoke", "--seeds", "0", "1", "--out", root/"out", "--set", *data)
    assert r.returncode == 0, r.stderr
    return root/"out", r.stdout


def test_black_is_linked_exactly_by_chance_and_raw_far_above(measured):
    root, said = measured
    for name, least in {"linkage-faces": 40, "linkage-videos": 60, "linkage-videos-within": 60, "action-probe": 20}.items():
        raw, black = (read_json(root/method/"measures"/f"{name}.json") for method in ("raw", "blackening"))
        assert raw["value"] > least > raw["chance"] and black["value"] == pytest.approx(black["chance"]), (name, raw, black)
        assert raw["ci"][0] <= raw["value"] <= raw["ci"][1] and len(raw["seeds"]) == 2
    assert "videos linked" in said and "blackening" in said


def test_black_shows_no_attribute_and_no_picture(measured):
    root, _ = measured
    black = {name: read_json(root/"blackening"/"measures"/f"{name}.json") for name in ("attributes-within", "attributes-images", "reconstruction")}
    assert black["attributes-within"]["value"] == pytest.approx(.5)
    assert black["attributes-images"]["value"] == pytest.approx(black["attributes-images"]["chance"], abs=.01)
    assert black["reconstruction"]["value"] < black["reconstruction"]["chance"] + 1.5
    assert set(black["reconstruction"]["floors"]) == {"training mean", "mean of the same labels"}


def test_what_cannot_be_measured_says_why(measured):
    "Each puppet is a person of its own: nothing links recordings."
    found = read_json(measured[0]/"raw"/"measures"/"linkage-recordings.json")
    assert found["value"] is None and found["n"] == 0 and "right answer" in found["reason"]


def test_results_of_other_conditions_do_not_share_a_table(measured):
    df = load_measures(measured[0])
    table = leakage_table(df)
    assert list(table.index) == ["raw", "blackening"] and table.shape[1] == 8
    mixed = df.assign(setup=np.where(df.label == "raw", "other", df.setup))
    with pytest.raises(Exception, match="do not belong in one table"): leakage_table(mixed)


@pytest.mark.parametrize("line, code, says", [
    ("measure raw --measures linkage-face", 2, "did you mean linkage-faces"),
    ("measure raw --preset demp", 2, "did you mean demo"),
    ("measure nowhere.onnx --set action_data=puppets:x", 1, "nowhere.onnx"),
    ("measure raw --set action_data=ucf101:/nowhere", 1, "/nowhere"),
    ("measure", 2, "what")])
def test_mistakes_are_one_line(line, code, says, tmp_path):
    r = call(*line.split(), cwd=tmp_path)
    assert r.returncode == code, r.stderr
    assert r.stderr.startswith("error: ") and r.stderr.count("\n") == 1 and says in r.stderr, r.stderr
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_settings_know_the_names_of_measures():
    "A misspelt one ends before anything is trained; what core knows is what evaluate has."
    from penaltyanon.core.files import UsageError
    from penaltyanon.core.settings import MEASURE_NAMES, resolve
    assert tuple(measures.MEASURES) == MEASURE_NAMES
    assert resolve("smoke", measures="all").measures == "all"
    with pytest.raises(UsageError, match="did you mean reconstruction"): resolve("smoke", measures="linkage-faces,reconstuction")


def test_committed_results_open_and_show():
    "Every row that the page names, and black frames at chance wherever somebody might be linked."
    from conftest import ROOT
    found = load_measures(ROOT/"runs/leakage-mini")
    table = leakage_table(found)
    assert set(table.index) == {"raw", "blur-weak", "blur-strong", "downsample-4x", "pixelate", "blackening"} and table.shape[1] == 8
    black = found[(found.label == "blackening") & found.measure.str.startswith("linkage")]
    assert len(black) == 4 and (black.value - black.chance).abs().max() < 1e-6
