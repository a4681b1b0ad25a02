"The preset `paper` is section 4.2: docs/reproduce.md says it value by value, and what it says is what `resolve` gives."
import re
import pytest, yaml
from conftest import ROOT
from penaltyanon.core.files import UserError
from penaltyanon.core.settings import PRESETS, evaluation_weights, left_out_weights, resolve, run_name, settings_dict
from penaltyanon.nets import recognizers
from penaltyanon.sweep.grid import prepare_data


def tables():
    "Rows of the tables below the heading: | paper | setting | value | where |."
    text = (ROOT/"docs/reproduce.md").read_text(encoding="utf-8").split("## Section 4.2, value by value")[1].split("\n## ")[0]
    return [re.fullmatch(r"\| (.+?) \| `(\w+)` \| `(.*?)` \| (.+?) \|", line) for line in text.splitlines() if line.startswith("| ") and "`" in line]


STATED = {r[2]: yaml.safe_load(r[3]) for r in tables()}


@pytest.mark.parametrize("setting", STATED)
def test_the_preset_has_the_value_of_the_table(setting):
    assert settings_dict(resolve("paper"))[setting] == STATED[setting]


def test_the_table_holds_the_numbers_of_section_4_2():
    "Written down here a second time, from the paper's text, so that table and preset cannot drift together."
    text = dict(size=224, identity_epochs=100, epochs=100, batch_clips=8, eval_batch=16, eval_action_epochs=100, eval_lr_privacy=1e-3, crop=0.8,
                frames=16, skip=4, action_weights="kinetics400", privacy_weights="simclr", action_model="i3d_r50", privacy_model="resnet50", backbone="unetpp")
    assert {name: STATED[name] for name in text} == text


def test_the_table_leaves_out_nothing_that_the_preset_decides():
    assert set(PRESETS["paper"]) - {"action_data", "privacy_data"} <= set(STATED)


def test_the_fresh_networks_start_from_weights_of_their_own():
    assert evaluation_weights(resolve("paper")) == ("kinetics400", ""), "f_B' from scratch, not from SimCLR"
    assert evaluation_weights(resolve("paper", eval_privacy_weights="imagenet"))[1] == "imagenet"
    assert evaluation_weights(resolve("paper", action_weights="none"))[0] == "", "f_T' as f_T where nothing else is said"
    assert evaluation_weights(resolve("demo", privacy_weights="mine.pth"))[1] == "mine.pth", "as in runs that are on disk"


def test_missing_weights_stop_a_run_in_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path/"torch"))
    def offline(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(UserError) as error: prepare_data(resolve("paper", action_data="ucf101:/not/there"))
    line = str(error.value)
    assert "\n" not in line and "/not/there" not in line, "the weights come first"
    for word in ("I3D_8x8_R50.pyth", str(tmp_path), "simclr_resnet50", "action_weights=none", "privacy_weights=none", "penaltyanon weights"): assert word in line
    with pytest.raises(UserError, match="/not/there"): prepare_data(resolve("paper", action_data="ucf101:/not/there", action_weights="none", privacy_weights="none"))
    recognizers.check_weights(resolve("demo"))


def test_a_run_that_trains_nothing_needs_no_weights_of_training():
    assert recognizers.weights_in_use(resolve("paper", method="raw")) == {("i3d_r50", "kinetics400"): "eval_action_weights"}, "of f_T' alone"
    assert not recognizers.weights_in_use(resolve("paper", method="raw", eval_action_weights="none"))
    assert ("i3d_r50", "kinetics400") in recognizers.weights_in_use(resolve("paper", eval_action_weights="none"))


def test_a_run_without_them_says_so_in_its_name():
    bare = resolve("paper", action_weights="none", privacy_weights="none")
    assert left_out_weights(settings_dict(bare)) == ["action_weights", "privacy_weights"] and "no_action_weights" in run_name(bare)
    assert not left_out_weights(settings_dict(resolve("paper"))) and "no_" not in run_name(resolve("paper"))
    assert bare == resolve("paper", action_weights="", privacy_weights="")
