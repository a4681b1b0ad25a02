"Properties of the ground floor: files whole or absent, settings that survive a round trip, names that tell runs apart."
import math, os, subprocess, sys
from dataclasses import fields, replace
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from penaltyanon.core import files, machine, run_folder, settings
from conftest import ROOT
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.core.settings import MACHINE_FIELDS, PRESETS, Settings, resolve

quick = hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Killed(BaseException): "A kill: no `except Exception` sees it."


@quick
@given(old=st.binary(max_size=200), new=st.binary(max_size=200), where=st.sampled_from(["fsync", "replace"]),
       what=st.sampled_from([OSError(28, "No space left on device"), KeyboardInterrupt(), Killed(), RuntimeError("x")]))
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, old, new, where, what):
    path = files.atomic_write(tmp_path/"f", old)
    def fail(*args): raise what
    with pytest.MonkeyPatch.context() as m:
        m.setattr(os, where, fail)
        with pytest.raises(UserError if isinstance(what, OSError) else type(what)): files.atomic_write(path, new)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    files.atomic_write(path, new)
    assert path.read_bytes() == new


@quick
@given(old=st.binary(max_size=200), new=st.binary(max_size=200), where=st.sampled_from(["fsync", "replace", "block"]),
       what=st.sampled_from([OSError(28, "No space left on device"), KeyboardInterrupt(), Killed(), RuntimeError("x")]))
def test_whoever_writes_under_a_temporary_name_leaves_the_old_file_and_nothing_else(tmp_path, old, new, where, what):
    path = files.atomic_write(tmp_path/"f", old)
    def fail(*args): raise what
    with pytest.MonkeyPatch.context() as m:
        if where != "block": m.setattr(os, where, fail)
        with pytest.raises(UserError if isinstance(what, OSError) else type(what)), files.atomic_path(path) as temporary:
            temporary.write_bytes(new)
            if where == "block": fail()
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["f"]


positive = st.floats(1e-12, 1e12)
zero_up = st.floats(0, 1e12)
count = st.integers(1, 10**9)
text = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)


def values_of(field):
    "A strategy for one setting: anything its comment allows."
    name = field.name
    if name in settings.CHOICES: return st.sampled_from(settings.CHOICES[name])
    if name == "decoder": return st.lists(count, min_size=1, max_size=5)
    if name == "B": return zero_up | st.just(math.inf)
    if name in ("crop", "holdout", "margin", "keep_rate"): return st.floats(0.01, 0.99)
    if name == "split": return st.integers(1, 3)
    if name == "measures":
        return st.just("all") | st.lists(st.sampled_from(settings.MEASURE_NAMES), unique=True).map(",".join)
    kind = type(getattr(Settings(), name))
    return {bool: st.booleans(), str: text, int: st.integers(8, 10**9), float: positive}[kind]


any_settings = st.fixed_dictionaries({f.name: values_of(f) for f in fields(Settings)}).map(lambda d: Settings(**d))


@quick
@given(s=any_settings)
def test_settings_come_back_from_yaml(tmp_path, s):
    path = files.write_yaml(tmp_path/"params.yaml", settings.settings_dict(s))
    assert Settings(**files.read_yaml(path)) == s


@quick
@given(s=any_settings, data=st.data())
def test_the_hash_changes_with_every_field_that_matters(s, data):
    field = data.draw(st.sampled_from(fields(Settings)))
    other = data.draw(values_of(field).filter(lambda v: (tuple(v) if isinstance(v, list) else v) != getattr(s, field.name)))
    changed = replace(s, **{field.name: other})
    assert (settings.settings_hash(changed) == settings.settings_hash(s)) == (field.name in MACHINE_FIELDS)
    assert (settings.run_name(changed) == settings.run_name(s)) == (field.name in MACHINE_FIELDS)
    own = changed.method != s.method and {changed.method, s.method} & set(settings.OWN_START_METHODS)
    assert (settings.start_key(changed) == settings.start_key(s)) == (field.name not in settings.START_FIELDS and not own)


def test_committed_runs_keep_their_names_and_hashes():
    "Their params.yaml were written before the fields of LATER_FIELDS existed, or after; the folder's name must be the same."
    runs = [run_folder.RunFolder.open(p.parent) for p in sorted((ROOT/"runs").glob("*/*/params.yaml"))]
    assert [settings.run_name(r.settings) for r in runs] == [r.path.name for r in runs]
    assert settings.start_key(resolve("demo")) == "8a98ddf1", "the starts that lie on disk are found as well"


def test_committed_runs_are_found_when_asked_for_today():
    "Where a preset has got later fields of its own since (how mini judges), an old run is what one asks for without them."
    runs = [run_folder.RunFolder.open(p.parent) for p in sorted((ROOT/"runs").glob("*/*/params.yaml"))]
    old = [r for r in runs if not set(settings.LATER_FIELDS) & set(files.read_yaml(r/"params.yaml"))]
    as_it_was = {f.name: f.default for f in fields(Settings) if f.name in settings.LATER_FIELDS}
    kept = [r for r in old if not set(settings.LATER_FIELDS) & set(PRESETS[r.settings.preset])]
    for found, later in ((kept, {}), (old, as_it_was)):
        again = [resolve(**later | files.read_yaml(r/"params.yaml")) for r in found]
        assert [settings.run_name(s) for s in again] == [r.path.name for r in found]
    assert len(old) > len(kept) >= 18 and {r.settings.preset for r in old} - {r.settings.preset for r in kept} == {"mini"}


@pytest.mark.parametrize("method", settings.CHOICES["method"])
def test_only_the_penalty_method_has_a_bound(method):
    "Whatever bound a sweep hands to another method, it is the same run."
    one, other = (resolve("demo", method=method, B=B, lam=2.0, penalty="hinge") for B in (0.3, 0.7))
    assert (one == other) == (method != "penalty")
    assert settings.run_name(one).startswith(f"{method}-{one.backbone}-s0-" if method in settings.TRAINED_METHODS[1:] else method)


def test_the_hash_is_the_same_in_another_process():
    assert settings._short_hash({"b": 0.3, "a": [1, "λ"]}) == "%s" % settings._short_hash({"a": [1, "λ"], "b": 0.3}) == "72f2f950"


@quick
@given(s=any_settings)
def test_a_parameters_cell_and_overrides_are_the_settings(s):
    "What a run notebook is given, split as papermill does it."
    values = settings.settings_dict(s)
    cell = {name: values.pop(name) for name in ("preset", *settings.NOTEBOOK_PARAMETERS)}
    assert settings.settings_from(cell | dict(overrides=values, run_root="", show_frames=True)) == resolve(**cell, **values)


numbers = [f.name for f in fields(Settings) if type(getattr(Settings(), f.name)) in (int, float)]


@pytest.mark.parametrize("name", numbers)
@pytest.mark.parametrize("value", [-1, -0.5, math.nan, -math.inf, True, "1", "1e-3", None, [1], 1j])
def test_no_number_accepts_nonsense(name, value):
    with pytest.raises(UsageError, match=f"^{name}: must be ") as e: resolve("smoke", **{name: value})
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_name_only_real_settings(preset):
    s = resolve(preset)
    assert s.preset == preset and s.units == "std" and s.scope == "clip"


def test_the_paper_preset_is_section_4_2():
    s = resolve("paper")
    assert (s.frames, s.skip, s.size, s.crop, s.batch_clips, s.epochs, s.lam, s.penalty) == (16, 4, 224, 0.8, 8, 100, 1.0, "hinge")
    assert (s.decoder, s.action_model, s.privacy_model) == ((256, 128, 64, 32), "i3d_r50", "resnet50")
    assert (s.eval_action_epochs, s.eval_privacy_epochs, s.eval_batch, s.eval_views, s.eval_lr_privacy) == (100, 100, 16, 5, 1e-3)


@quick
@given(rows=st.lists(st.dictionaries(text, st.integers() | zero_up | text, max_size=4), max_size=8), cut=st.integers(0, 60))
def test_metrics_survive_a_kill_at_any_byte(tmp_path_factory, rows, cut):
    run = RunFolder.create(tmp_path_factory.mktemp("runs"), resolve("smoke"))
    for row in rows: run.log(row)
    path = run/"metrics.jsonl"
    path.write_bytes(path.read_bytes()[:max(0, path.stat().st_size - cut)])
    kept = run.metrics()
    assert kept == rows[:len(kept)]
    again = RunFolder.create(run.path.parent, run.settings, resume=True)
    again.log({"step": 1})
    assert again.metrics() == kept + [{"step": 1}]


def test_done_is_written_last(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path, resolve("smoke"))
    def fail(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="results.json"): run.finish({"B": 0.3})
    assert not run.is_done and run_folder.finished_runs(tmp_path) == []


def test_environment_says_which_commit(tmp_path):
    env = machine.capture_env()
    assert set(env) >= {"python", "cpu", "cores", "threads", "device_name", "versions", "commit", "dirty", "date"}
    files.write_json(tmp_path/"env.json", env)
    assert files.read_json(tmp_path/"env.json") == env


def test_the_name_of_a_device_needs_torch_only_when_it_depends_on_it():
    code = """
import sys
sys.modules["torch"] = None     # as if it were not installed
from penaltyanon.core.machine import resolve_device, is_out_of_memory
print(resolve_device("cpu"), resolve_device("auto"), is_out_of_memory(MemoryError()))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "cpu cpu True\n", said.stderr


@pytest.mark.parametrize("name, error, says", [
    ("warp", UsageError, "use auto, cpu, cuda or cuda:N"), ("cuda:99", UserError, "usable GPUs; use device=auto or cpu")])
def test_a_device_that_is_not_there_is_one_line(name, error, says):
    for choose in (machine.resolve_device, machine.pick_device):
        with pytest.raises(error, match=says) as e: choose(name)
        assert "\n" not in str(e.value)
