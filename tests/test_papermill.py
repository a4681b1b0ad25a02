"papermill as a person calls it: what it lists, what a parameter left alone means, what is refused, who is shown; and every command of the pages."
import base64, os, re, subprocess, time
import nbformat, pytest, yaml
from click.testing import CliRunner
from papermill.cli import papermill
from conftest import BIN, DRAWINGS, FIGURES, ROOT, RUNS, copy_of_the_repository
from penaltyanon.core.files import UserError, UsageError, read_json, write_yaml
from penaltyanon.core.parameters import parse_parameters, read_parameters
from penaltyanon.core.settings import PRESETS, TRAINED_METHODS, resolve, run_name, settings_dict, settings_from
from penaltyanon.data.layouts import write_layouts
from penaltyanon.results import report
from penaltyanon.sweep.grid import expand_grid
from penaltyanon.sweep.notebooks import notebook_parameters
from synthetic import fake_sweep

TRAIN, EVALUATE = ROOT/"nbs/runs/train_anonymizer.ipynb", ROOT/"nbs/runs/evaluate.ipynb"
name = lambda p: str(p.relative_to(ROOT))


def papermill_run(*words, cwd):
    "The command, as in a terminal."
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    r = subprocess.run([BIN/"papermill", "--no-progress-bar", *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    return r.returncode, r.stdout


def parameters_source(path): return next(c.source for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", []))


@pytest.mark.parametrize("path", [*RUNS, *FIGURES], ids=name)
def test_papermill_lists_every_parameter_with_its_type_and_what_it_is(path):
    listed = CliRunner().invoke(papermill, ["--help-notebook", str(path)])
    assert listed.exit_code == 0 and "Unknown type" not in listed.output
    declared = parse_parameters(parameters_source(path))
    for parameter, (kind, default) in declared.items():
        said = re.search(rf"^  {parameter}: {kind} \(default (.*?)\)\s+(\S.*)$", listed.output, re.M)
        assert said and yaml.safe_load(said[1].replace("None", "null")) == default and len(said[2]) > 9, f"{parameter} of {path.name}: {listed.output}"
    assert len(re.findall(r"^  \w+: ", listed.output, re.M)) == len(declared)


@pytest.mark.parametrize("path", [*RUNS, *FIGURES], ids=name)
def test_the_first_cell_below_the_parameters_reads_them(path):
    code = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    at = next(i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", []))
    assert at == 0 and "read_parameters(globals())" in code[1].source and "torch" not in code[1].source


# ---- a parameter left alone is the preset's
@pytest.mark.parametrize("path", [TRAIN, EVALUATE], ids=name)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_notebook_and_a_sweep_mean_the_same_by_a_preset(path, preset):
    alone = notebook_parameters(path) | dict(preset=preset)
    for b in (0.3, 0.7):
        swept, = expand_grid(preset, methods=("penalty",), B=(b,))
        assert settings_from(alone | dict(B=b)) == swept and run_name(settings_from(alone | dict(B=b))) == run_name(swept)
    for method in (*TRAINED_METHODS, "raw", "blur-strong"):
        assert settings_from(alone | dict(method=method)) == resolve(preset, method=method)
    assert settings_from(alone | dict(preset="paper", B=0.7)).penalty == "hinge"


# ---- what papermill makes of words, and what the first cell makes of that
def first_cell(tmp_path, words, path=TRAIN):
    "The variables after the first cell below the parameters, which are put there by papermill itself."
    made = CliRunner().invoke(papermill, [str(path), str(tmp_path/"prepared.ipynb"), "--prepare-only", *words])
    assert made.exit_code == 0, made.output
    space = {"In": [""]}
    for cell in (c for c in nbformat.read(tmp_path/"prepared.ipynb", 4).cells if c.cell_type == "code"):
        space["In"].append(cell.source)
        exec(cell.source, space)
        if "read_parameters" in cell.source: return space


coded = base64.b64encode(b"{B: 0.7}").decode()
GIVEN = [
    (["-p", "B", "0.7"], dict(B=0.7)), (["-p", "B", "1"], dict(B=1.0)), (["-p", "B", "inf"], dict(B=float("inf"))), (["-r", "B", "0.7"], dict(B=0.7)),
    (["-y", "B: .inf"], dict(B=float("inf"))), (["-p", "seed", "1"], dict(seed=1)), (["-p", "attributes", "None"], {}), (["-b", coded], dict(B=0.7)),
    (["-p", "overrides", "{steps: 5}"], dict(steps=5)), (["-p", "overrides", "steps=5 decoder=[16, 8, 8, 8] cache=false"], dict(steps=5, decoder=[16, 8, 8, 8], cache=False)),
    (["-y", "overrides: {steps: 5, lr_action: 1.0e-3}"], dict(steps=5, lr_action=1e-3)), (["-y", "{B: 0.5, seed: 2}", "-p", "B", "0.7"], dict(B=0.7, seed=2)),
    (["-p", "preset", "paper", "-p", "B", "0.7"], dict(preset="paper", B=0.7)), (["-p", "penalty", "none"], dict(penalty="none")),
    (["-p", "B", "0.7", "--inject-paths"], dict(B=0.7)), (["-p", "overrides", "B=0.3"], dict(B=0.3))]


@pytest.mark.parametrize("words, means", GIVEN, ids=[" ".join(w) for w, _ in GIVEN])
def test_what_is_given_arrives(tmp_path, words, means):
    assert first_cell(tmp_path, words)["s"] == resolve(**{"preset": "smoke", **means})


def test_a_file_of_parameters_arrives_and_words_beat_it(tmp_path):
    path = write_yaml(tmp_path/"mine.yaml", dict(preset="demo", B=0.5, overrides=dict(steps=7), run_root="x", show_frames=False))
    space = first_cell(tmp_path, ["-f", str(path), "-p", "B", "0.7", "-p", "show_frames", "true"])
    assert space["s"] == resolve("demo", B=0.7, steps=7) and (space["run_root"], space["show_frames"]) == ("x", True)


REFUSED = [
    (["-p", "b", "0.9"], "b: no such parameter; did you mean B?"), (["-p", "lamda", "1"], "did you mean lam?"), (["-p", "runroot", "x"], "did you mean run_root?"),
    (["-p", "steps", "500"], "steps: no parameter of this notebook; write -p overrides 'steps=...'"),
    (["-p", "overrides", "steps"], "overrides: must be a dict, got 'steps'; write -p overrides 'name=value other=value'"),
    (["-p", "overrides", "5"], "overrides: must be a dict"), (["-p", "overrides", "{step: 5}"], "step: no such parameter; did you mean steps?"),
    (["-p", "overrides", "{steps: [}"], "overrides: must be a dict"), (["-p", "B", "0.7", "-p", "overrides", "B=0.3"], "B: given twice"),
    (["-y", "{lam: 1e-3}"], "lam: must be a number, got '1e-3' (str); write 1.0e-3"), (["-y", "{B: inf}"], "write .inf"), (["-p", "B", "wide"], "B: must be a number, got 'wide'"),
    (["-y", "{overrides: {lr_action: 1e-3}}"], "lr_action: must be a number, got '1e-3' (str); write 1.0e-3"), (["-p", "B", "nan"], "not NaN"), (["-p", "B", "-1"], "at least 0"),
    (["-p", "seed", "1.0"], "seed: must be a whole number"), (["-p", "seed", "True"], "seed: must be a whole number"), (["-p", "B", ""], "B: must be a number, got None"),
    (["-p", "run_root", "2026"], "run_root: must be text, got 2026; write -r run_root 2026"), (["-p", "preset", "None"], "preset: must be text"),
    (["-p", "preset", "papr"], "did you mean paper?"), (["-p", "penalty", "None"], "penalty: write none for no penalty"), (["-p", "method", "blurstrong"], "did you mean blur-strong?"),
    (["-p", "show_frames", "perhaps"], "show_frames: must be true or false")]


@pytest.mark.parametrize("words, line", REFUSED, ids=[" ".join(w) for w, _ in REFUSED])
def test_what_is_wrong_is_one_line_that_says_what_to_write(tmp_path, words, line):
    with pytest.raises(UsageError, match=re.escape(line)) as e: first_cell(tmp_path, words)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("path", [p for p in FIGURES if p.stem != "table3_lambda"] + [ROOT/"nbs/runs/attack.ipynb"], ids=name)
def test_other_notebooks_refuse_a_typo_too(path, tmp_path):
    "`-p run runs/mine` drew other runs than those that were asked for."
    wrong, meant = {"attack": ("runs", "run"), "diagrams": ("outs", "out")}.get(path.stem, ("run", "runs"))
    with pytest.raises(UsageError, match=f"{wrong}: no such parameter; did you mean {meant}?"): first_cell(tmp_path, ["-p", wrong, "runs/mine"], path)


def test_an_attack_takes_its_lists_and_dictionaries_from_words(tmp_path):
    space = first_cell(tmp_path, ["-p", "tests", "one, two", "-p", "data", "ucf101=ucf101:/data/UCF vispr1=vispr1:/data/vispr"], ROOT/"nbs/runs/attack.ipynb")
    assert space["tests"] == ["one", "two"] and space["data"] == dict(ucf101="ucf101:/data/UCF", vispr1="vispr1:/data/vispr")


def test_cells_run_again_in_another_order_are_no_typo():
    "As in JupyterLab: what papermill once put there does not count once the parameters cell was run again."
    cell, after = parameters_source(TRAIN), notebook_parameters(TRAIN)
    read_parameters({"In": ["", cell, "# Parameters\nb = 1", "fig = 3", cell, "rows = 4"], **after, "b": 1, "rows": 4})
    with pytest.raises(UsageError, match="did you mean B"): read_parameters({"In": ["", cell, "# Parameters\nb = 1"], **after, "b": 1})


# ---- in a kernel
def test_a_typo_ends_in_the_first_cell_with_one_line_and_leaves_no_run(tmp_path):
    code, said = papermill_run(TRAIN, "out.ipynb", "-p", "b", "0.9", "-p", "run_root", "mine", cwd=tmp_path)
    assert code == 1 and said.rstrip().splitlines()[-1] == "UsageError: b: no such parameter; did you mean B?"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb"]
    error, = (o for c in read_json(tmp_path/"out.ipynb")["cells"] for o in c.get("outputs", []) if o["output_type"] == "error")
    assert error["traceback"] == ["UsageError: b: no such parameter; did you mean B?"]


# ---- nobody is shown unless asked for by name
@pytest.fixture(scope="module")
def people(tmp_path_factory):
    "Data in the official layouts: generated, but nobody can tell from how they lie."
    root = write_layouts(tmp_path_factory.mktemp("official"), groups=4, images=(8, 2, 4), size=32, frames=10)
    tiny = {k: v for k, v in settings_dict(resolve("smoke")).items() if v != settings_dict(resolve("paper"))[k] and k not in ("preset", "penalty", "action_data", "privacy_data")}
    return dict(action_data=f"ucf101:{root/'ucf101'}", privacy_data=f"vispr1:{root/'vispr'}"), tiny | dict(skip=1)


def pictures(notebook): return sum("image/png" in o.get("data", {}) for c in read_json(notebook)["cells"] for o in c.get("outputs", []))


def test_a_run_of_real_people_shows_nobody_and_is_the_run_of_the_sweep(people, tmp_path):
    "`-p preset paper -p B 0.7` from another folder: the hinge, the name and hash of `sweep --preset paper`, no frame anywhere."
    data, tiny = people
    write_yaml(tmp_path/"tiny.yaml", dict(**data, overrides=tiny))
    code, said = papermill_run(TRAIN, "out.ipynb", "-f", "tiny.yaml", "-p", "preset", "paper", "-p", "B", "0.7", "-p", "run_root", "mine", cwd=tmp_path)
    assert code == 0 and "unknown parameter" not in said, said[-3000:]
    swept, = expand_grid("paper", methods=("penalty",), B=(0.7,), **data, **tiny)
    run, = (tmp_path/"mine").glob("penalty-*")
    assert run.name == run_name(swept) and swept.penalty == "hinge"
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("frames.*"))
    assert pictures(tmp_path/"out.ipynb") == 1, "the curves"


def test_they_are_kept_when_asked_for(people, tmp_path, run_notebook_steps):
    data, tiny = people
    given = dict(preset="paper", **data, overrides=tiny, run_root=str(tmp_path/"mine"), show_frames=True)
    for _ in run_notebook_steps("runs/train_anonymizer", given, tmp_path/"out.ipynb"): time.sleep(0.05)
    assert len(list((tmp_path/"mine").rglob("frames.npz"))) == 1


@pytest.mark.parametrize("path", [p for p in RUNS if p != TRAIN], ids=name)
def test_evaluations_and_attacks_draw_no_frames(path): assert not re.search(r"imshow|imsave|frames\.", path.read_text())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "SYNTHETIC runs that say they are of real people, with frames kept, as an older version kept them."
    root = fake_sweep(tmp_path_factory.mktemp("SYNTHETIC")/"people", seeds=(0,))
    for path in root.glob("*/params.yaml"): write_yaml(path, yaml.safe_load(path.read_text()) | dict(action_data="ucf101:/data/UCF-101", privacy_data="vispr1:/data/vispr"))
    return root


@pytest.mark.parametrize("drawing", ["fig2_frames", "fig6to8_gallery", "story"])
@pytest.mark.parametrize("asked", [None, True])
def test_figures_draw_people_only_when_asked(kept, drawing, asked, tmp_path, run_notebook_steps):
    "Also where frames lie in the run folders."
    def draw():
        for _ in run_notebook_steps(DRAWINGS[drawing][0], dict(runs=str(kept), out=str(tmp_path/"out"), show_frames=asked), tmp_path/"a.ipynb"): time.sleep(0.05)
    if asked or drawing == "fig6to8_gallery": draw()
    else:
        with pytest.raises(UserError, match="real people are not shown unless asked for"): draw()
    assert bool(list(tmp_path.rglob("*.png"))) == bool(asked)


@pytest.mark.parametrize("asked", [None, True])
def test_a_report_passes_on_what_was_asked(kept, asked, monkeypatch, tmp_path):
    passed = {}
    monkeypatch.setattr(report, "run_notebook", lambda notebook, parameters, output: passed.update({notebook: parameters}))
    report.write_report(kept, tmp_path/"page.html", show_frames=asked)
    assert {n.split("/")[1]: p["show_frames"] for n, p in passed.items() if "show_frames" in p} == dict.fromkeys(report.FRAME_FIGURES, asked)


# ---- the pages
def commands(page):
    "Lines of shell blocks that call papermill, or that write the file it reads."
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT/page).read_text(encoding="utf-8"), re.S)
    return [line.split("  #")[0].rstrip() for block in blocks for line in block.splitlines() if re.match(r"papermill |echo .* > \w+\.yaml", line)]


def test_every_papermill_line_of_the_pages_runs(tmp_path):
    tree = copy_of_the_repository(tmp_path/"repo")
    lines = {page: commands(page) for page in ("README.md", "docs/sweeps.md")}
    assert all(lines.values()) and all(f" {option} " in f"{lines}" for option in ("-p", "-y", "-f", "--help-notebook"))
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    for line in (line for page in lines.values() for line in page):
        r = subprocess.run(["bash", "-c", line], cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        assert r.returncode == 0 and "unknown parameter" not in r.stdout, f"{line}\n{r.stdout[-3000:]}"
    for path in tree.rglob("*.png"): assert path.stat().st_size > 1000
