"The paper's numbers against its text; tables, comparisons and exports from SYNTHETIC run folders."
import re
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest
from conftest import DRAWINGS, SHARED, TABLES, code_cells
from penaltyanon.results import paper, tables
from penaltyanon.core.files import UserError
from penaltyanon.core.settings import resolve
from penaltyanon.evaluate.protocols import FIGURE3_BOUNDS, PROTOCOLS
from penaltyanon.sweep.grid import run_label
from synthetic import fake_action, fake_predicted_run as fake_run

# ---- the transcription
TEXT = next(iter(sorted((SHARED.parent/"paper").glob("000_*.txt"))), None)
OURS = {"Raw data": "raw", "Raw": "raw", "Downsample-2×": "downsample-2x", "Downsample-4×": "downsample-4x", "Obf-Blackening": "blackening (persons)",
        "Obf-StrongBlur": "blur-strong (persons)", "Obf-WeakBlur": "blur-weak (persons)", "VITA": "vita", "SPACT": "spact", "STPrivacy": "stprivacy"}
CELL = re.compile(r"(\d+(?:\.\d+)?)(?:\s*\(\\downarrow\s*([\d.]*)\s*\))?")


def row_of(line):
    "A line of a table as (our name of the row, [(number, drop), ...]), or None; empty cells leave no trace in the text"
    line = re.sub(r"\[\d+\]|^Ours ", "", line.strip())
    if m := re.match(r"(B = 0\.\d) (.*)", line): name, rest = m[1], m[2]
    elif m := re.match(r"([01]\.\d) (\d.*)", line): name, rest = f"λ = {m[1]}", m[2]
    elif n := next((n for n in OURS if line.startswith(n + " ")), None): name, rest = OURS[n], line[len(n):]
    else: return None
    return (name, [tuple(g or "" for g in c) for c in CELL.findall(rest)]) if not CELL.sub("", rest).strip() else None


def printed(number):
    "The rows above the caption of a table, up to its header"
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    end = next(i for i, l in enumerate(lines) if l.startswith(f"Table {number}:"))
    begin = max(i for i in range(end) if lines[i].startswith(("Method ", "λpenalty")))
    return [r for r in map(row_of, lines[begin:end]) if r]


@pytest.mark.skipif(TEXT is None, reason="the paper's text is not at hand (../shared/paper)")
@pytest.mark.parametrize("name", paper.PRINTED_TABLES)
def test_every_cell_is_what_the_paper_prints(name):
    theirs, ours = printed(re.match(r"table(\d)", name)[1]), paper.paper_table(name)
    assert [r for r, _ in theirs] == list(ours.row.unique())
    for row, cells in theirs: assert cells == list(ours[ours.row == row][["printed", "drop"]].itertuples(index=False, name=None)), row
    assert sum(len(c) for _, c in theirs) == len(ours) >= 18


def test_the_reader_of_the_text_reads():
    assert row_of(r"Ours B = 0.3 78.26 (\downarrow 0.26) 0.4 (\downarrow )") == ("B = 0.3", [("78.26", "0.26"), ("0.4", "")])
    assert row_of("VITA [33] 62.10 0.461") == ("vita", [("62.10", ""), ("0.461", "")]) and row_of("Method UCF101") is None
    assert row_of("0.7 74.28 57.60 0.466")[0] == "λ = 0.7" and row_of("Raw data are 3 and") is None


def test_the_slips_that_the_audit_names_are_found():
    found = {(n, r.row, r.column) for n in paper.PRINTED_TABLES for r in paper.misprinted_drops(n).itertuples()}
    assert {("table1_known", "B = 0.3", "UCF101 Top-1"), ("table1_known", "B = 0.9", "VPHMDB Top-1"), ("table1_known", "B = 0.9", "PA-HMDB F1"),
            ("table2_novel", "B = 0.5", "VPUCF cMAP"), ("table6_pretrained_attacker", "B = 0.3", "PA-HMDB F1")} <= found
    notes = "".join(paper.table_footnotes("table1_known"))
    assert "I3D-R50" in notes and "exchanged" in notes and "19.93, is 15.93" in notes


# ---- synthetic runs
ACTION = dict(kind="action", sees="clips")
TESTS = {"novel-action": ACTION | dict(on="hmdb51", test_data="puppets-b:S", model="r3d_small"), "novel-privacy": dict(on="vispr2", test_data="puppets-b-images:S"),
         "pahmdb-action": ACTION | dict(on="pa-hmdb51", model="r3d_small"), "action-r3d18": ACTION | dict(on="ucf101", model="r3d18"),
         "action-r2plus1d18-kinetics400": ACTION | dict(on="ucf101", model="r2plus1d18", weights="kinetics400"),
         "raw-attacker": dict(learns_from="raw"), "raw-attacker-frames": dict(learns_from="raw", on="vp-ucf101"),
         "privacy-resnet18": dict(model="resnet18"), "privacy-resnet18-imagenet": dict(model="resnet18", weights="imagenet"), "privacy-mobilenet_v2": dict(model="mobilenet_v2")}
VPHMDB = dict(action_data="puppets-b:SYNTHETIC", privacy_data="puppets-images:SYNTHETIC")
FULL = [name for name in DRAWINGS if name.startswith("table") or name in ("pareto", "fig6to8_gallery")]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    "Two training sets, two seeds, every further test; closed forms and a method nobody has heard of; B = 0.5 lacks its tests."
    root = tmp_path_factory.mktemp("SYNTHETIC")/"full"
    for seed in (0, 1):
        fake_run(root, "raw", seed=seed, right=95, shift=4., method="raw", tests=TESTS)
        fake_run(root, "B = 0.3", .3, seed=seed, right=90, shift=1.5, tests=TESTS)
        fake_run(root, "B = 0.5", .5, seed=seed, right=85, shift=1., predictions=seed == 0)
        fake_run(root, "blur-weak", seed=seed, right=70, shift=2., method="blur-weak", tests=TESTS)
        fake_run(root, "newest", seed=seed, right=70, shift=.3, method="newest")
        fake_run(root, "raw", seed=seed, right=92, shift=3., method="raw", tests={"raw-attacker": dict(learns_from="raw"), "vpucf-action": ACTION | dict(on="vp-ucf101", model="r3d_small"), "pahmdb-action": ACTION | dict(on="pa-hmdb51", model="r3d_small")}, **VPHMDB)
    return root


def test_rows_come_as_they_are_in_the_papers_order(full):
    t = tables.make_table("table1_known", full, repeats=50)
    rows = list(t.rows.index)
    wanted = ["raw", "blur-weak (persons)", "blur-weak (whole frame)", "spact", "newest", "B = 0.3", "B = 0.5", "B = 0.9"]
    assert [r for r in rows if r in wanted] == wanted
    assert t.rows.loc["blur-weak (whole frame)", "paper: UCF101 Top-1"] == "—" and t.rows.loc["blur-weak (persons)", "paper: UCF101 Top-1"] == "61.52"
    assert t.rows.loc["newest", "UCF101 Top-1 % ↑"] == "70.0 [68.0, 72.0] ± 0.0" and t.rows.loc["newest", "paper: UCF101 Top-1"] == "—"
    assert t.rows.loc["spact", "UCF101 Top-1 % ↑"] == "—" and t.rows.loc["spact", "paper: UCF101 Top-1"] == "62.03"


def test_the_two_training_sets_keep_to_their_columns(full):
    t = tables.make_table("table1_known", full, repeats=50)
    assert t.rows.loc["raw", ["UCF101 Top-1 % ↑", "VPHMDB Top-1 % ↑", "PA-HMDB Top-1 % ↑"]].tolist() == ["95.0 [93.0, 97.0] ± 0.0", *["92.0 [90.0, 94.0] ± 0.0"]*2]
    novel = tables.make_table("table2_novel", full, repeats=50)
    assert novel.rows.loc["raw", ["PA-HMDB Top-1 % ↑", "VPUCF Top-1 % ↑"]].tolist() == ["95.0 [93.0, 97.0] ± 0.0", "92.0 [90.0, 94.0] ± 0.0"]
    assert "no run for VPUCF cMAP, VPUCF F1" in novel.gaps and "HMDB51 Top-1: puppets-b, n = 100" in novel.caption


def test_other_networks_get_their_columns(full):
    five, seven, eight = (tables.make_table(n, full, repeats=50).rows for n in ("table5_recognizers", "table7_attackers", "table8_attackers_imagenet"))
    assert five.loc["B = 0.3", "R3D-18 Top-1 % ↑"].startswith("90.0") and five.loc["B = 0.3", "R2plus1D (K400) Top-1 % ↑"].startswith("90.0") and five.loc["B = 0.3", "R2plus1D Top-1 % ↑"] == "—"
    assert five.loc["B = 0.5", "r3d_small Top-1 % ↑"].startswith("85.0") and five.loc["B = 0.5", "R3D-18 Top-1 % ↑"] == "—"
    assert seven.loc["B = 0.3", "R3D-18 cMAP % ↓"].startswith("65.0") and "mobilenet_v2 cMAP % ↓" in seven and "r2d_small F1 ↓" in seven
    assert eight.loc["B = 0.3", "R3D-18 cMAP % ↓"].startswith("65.0") and "mobilenet_v2 cMAP % ↓" not in eight


def test_notes_compare_where_both_kept_predictions(full):
    m = tables.load_measurements(full)
    notes = tables.paired_differences("table1_known", m, repeats=200)
    assert notes.loc["B = 0.3", "UCF101 Top-1 % ↑"].startswith("worse by 5.0 [") and notes.loc["blur-weak (whole frame)", "UCF101 Top-1 % ↑"].endswith(", significant")
    d = tables.compare_rows(tables.column_measurements(m, dict(test="utility", trained="ucf101")), "raw", 50)
    assert (d["B = 0.3"].seeds, d["B = 0.5"].seeds) == (2, 1), "only one seed of B = 0.5 kept its predictions"
    assert tables.paired_differences("table1_known", m, reference="λ = 0").empty


def test_data_that_differ_are_refused_not_averaged(full, tmp_path):
    fake_run(tmp_path/"a", "raw", method="raw"); fake_run(tmp_path/"b", "raw", method="raw")
    with pytest.raises(UserError, match="are both raw, seed 0; name a folder that holds one"): tables.make_table("table1_known", tmp_path)
    with pytest.raises(UserError, match="no finished run"): tables.make_table("table1_known", tmp_path/"c") if (tmp_path/"c").mkdir() is None else None


def test_seeds_on_two_data_sets_are_refused_not_averaged(tmp_path):
    "UCF101 with seed 0 and a small part of it with seed 1: one row of a table, but not one number."
    for seed, root in enumerate(("ucf101", "ucf101-mini")): fake_run(tmp_path/"SYNTHETIC", "raw", seed=seed, method="raw", action_data=f"ucf101:/{root}", privacy_data="vispr1:/vispr")
    with pytest.raises(UserError, match="UCF101 Top-1: runs on different data .ucf101:/ucf101 and ucf101:/ucf101-mini."): tables.make_table("table1_known", tmp_path/"SYNTHETIC")


def test_after_a_sweep_over_the_weight_our_rows_stand_beside_the_papers(tmp_path):
    for lam in (.1, .5, 1.): fake_run(tmp_path/"SYNTHETIC"/f"{lam}", "B = 0.3", .3, right=60 + 10*lam, lam=lam, penalty="hinge")
    fake_run(tmp_path/"SYNTHETIC", "B = 0.5", .5, right=50, penalty="hinge")
    rows = tables.make_table("table1_known", tmp_path/"SYNTHETIC").rows
    assert rows.loc["B = 0.3", ["UCF101 Top-1 % ↑", "paper: UCF101 Top-1"]].tolist() == ["70.0 [68.0, 72.0]", "78.26*"]
    assert rows.loc["B = 0.3, λ = 0.1", ["UCF101 Top-1 % ↑", "paper: UCF101 Top-1"]].tolist() == ["61.0 [59.0, 63.0]", "—"]
    assert rows.loc["B = 0.5", "UCF101 Top-1 % ↑"].startswith("50.0")


# ---- every cell that the paper prints
ROWS = {"raw": "raw", "downsample-2x": "downsample-2x", "downsample-4x": "downsample-4x", "blackening (persons)": "blackening@people",
        "blur-strong (persons)": "blur-strong@people", "blur-weak (persons)": "blur-weak@people", "vita": "vita", "spact": "spact", "stprivacy": "stprivacy"}


def test_methods_that_the_paper_prints_are_called_as_it_calls_them(monkeypatch):
    "The labels of the runs that a sweep makes."
    for label, method in ROWS.items(): assert run_label(resolve("demo", method=method)) == label
    for B in FIGURE3_BOUNDS: assert run_label(resolve("demo", B=B)) == f"B = {B:g}"


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    "Runs of all protocols in one folder, as their sweeps would leave them: every row with every attack, the lambda sweep too."
    root, trained = tmp_path_factory.mktemp("SYNTHETIC")/"everything", {}
    for p in PROTOCOLS.values(): trained.setdefault((p.action, p.privacy), []).extend(p.attacks)
    for (action, privacy), attacks in trained.items():
        tests = {a.name: dict(kind=a.kind, sees=a.sees, train=a.train, on=a.tested_on, test_data=f"{a.tested_on}:/data", model=a.model or "i3d_r50",
                              weights=a.weights, learns_from=a.learns_from) for a in attacks}
        more = dict(tests=tests, predictions=False, action_data=f"{action}:/data", privacy_data=f"{privacy}:/data", penalty="hinge")
        for label, method in ROWS.items(): fake_run(root/action/label.split()[0], label, method=method, **more)
        for B in PROTOCOLS["figure3-bounds"].vary["B"]: fake_run(root/action, f"B = {B:g}", B, **more)
    vary = PROTOCOLS["table3-lambda"].vary
    for lam in vary["lam"][:-1]: fake_run(root/f"lambda{lam}", "B = 0.3", vary["B"][0], **more | dict(tests={}, action_data="ucf101:/data", lam=lam))
    fake_run(root/"lambda0", "λ = 0", **more | dict(tests={}, action_data="ucf101:/data", penalty="none"))
    return root


@pytest.mark.parametrize("name", paper.PRINTED_TABLES)
def test_every_cell_that_the_paper_prints_can_be_filled(name, everything):
    rows = tables.make_table(name, everything, repeats=2).rows
    empty = [(r.row, r.column) for r in paper.paper_table(name).itertuples() if rows.loc[r.row, tables.table_heading(r.column)] == "—"]
    assert not empty


def test_the_column_that_the_paper_leaves_open_is_shown_both_ways(everything):
    "MViTv2 from random weights, and from Kinetics-400."
    five = tables.make_table("table5_recognizers", everything, repeats=2).rows
    assert "—" not in {five.loc["raw", "MViTv2 Top-1 % ↑"], five.loc["raw", "mvit_v2_s (kinetics400) Top-1 % ↑"]}


def test_figure_3_has_both_ends(everything, tmp_path, capsys):
    path, parameters = DRAWINGS["fig3_penalty"]
    execute(path, runs=str(everything), data="ucf101 + vispr1", out=str(tmp_path), **parameters)
    assert (tmp_path/"fig3_penalty.png").is_file() and "B = " not in capsys.readouterr().out.partition("Top-1 of")[0]
    with pytest.raises(UserError, match="runs on different data: "): execute(path, runs=str(everything))


# ---- comparisons
def predictions(right, n): return tables.Predictions(*fake_action(n, right), np.arange(n).astype(str))


def test_degenerate_comparisons():
    p = predictions(70, 100)
    same = tables.compare_predictions([p, p], [p, p])
    assert (same.value, same.lo, same.hi, same.significant) == (0., 0., 0., False) and same.describe() == "no difference [0.0, 0.0]"
    one = tables.compare_predictions([predictions(1, 1)], [predictions(0, 1)])
    assert one.value == 100. and np.isnan(one.lo) and not one.significant and "n = 1: no interval" in one.describe()
    assert tables.compare_predictions([p], [predictions(60, 100)]).value == pytest.approx(10.) == -tables.compare_predictions([predictions(60, 100)], [p]).value


def test_a_plain_bootstrap_says_the_same():
    "Against a loop over resamples, records shuffled on one side."
    rng = np.random.default_rng(1)
    a, b = predictions(80, 100), predictions(72, 100)
    mix = rng.permutation(100)
    d = tables.compare_predictions([a], [tables.Predictions(b.scores[mix], b.labels[mix], b.names[mix])], repeats=4000)
    hit = lambda p: (p.scores.argmax(1) == p.labels).astype(float)*100
    loop = [np.mean((hit(a) - hit(b))[rng.integers(0, 100, 100)]) for _ in range(4000)]
    assert d.value == pytest.approx(8.) and np.allclose([d.lo, d.hi], np.percentile(loop, [2.5, 97.5]), atol=1.1)


def test_unknown_labels_are_left_out():
    y = np.array([[1, np.nan], [0, 1], [1, 0], [0, np.nan]], float)
    p = tables.Predictions(np.array([[.9, 9], [.8, 1], [.7, 2], [.1, -9]]), y, np.arange(4).astype(str))
    assert tables.mean_precisions(p.scores, p.labels, tables.resample_counts(4, 3))[0] == pytest.approx(100*((1 + 2/3)/2 + 1/2)/2)


def test_hypervolume_equals_a_grid():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        pts = np.column_stack([rng.integers(-5, 50, 15), rng.integers(0, 100, 15)])
        x, y = np.meshgrid(np.arange(-5, 40) + .5, np.arange(12, 100) + .5)
        brute = sum(((pts[:, 0] < a) & (pts[:, 1] > b)).any() for a, b in zip(x.ravel(), y.ravel()))
        assert tables.hypervolume(pts, (40, 12)) == brute


# ---- exports
def unescaped(line): return [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_exports_hold_the_same_cells(full, tmp_path):
    t = tables.make_table("table1_known", full, repeats=50)
    tables.publish_table(tmp_path, t)
    cells = [["", *t.rows.columns], *([i, *r] for i, r in zip(t.rows.index, t.rows.values))]
    text = (tmp_path/"table1_known.md").read_text().split("\n\n")[0].splitlines()
    assert [[re.sub(r"\\(.)", r"\1", c) for c in unescaped(l)] for l in text[:1] + text[2:]] == cells and set(unescaped(text[1])) == {"---"}
    csv = pd.read_csv(tmp_path/"table1_known.csv", dtype=str, keep_default_na=False)
    assert csv.values.tolist() == cells[1:] and list(csv.columns)[1:] == cells[0][1:]
    tex = (tmp_path/"table1_known.tex").read_text()
    bare = tex.replace("\\\\", "").replace(r"\{", "").replace(r"\}", "")
    depth = np.cumsum([{"{": 1, "}": -1}.get(c, 0) for c in bare])
    assert depth[-1] == 0 and depth.min() >= 0 and tex.count("\\begin{") == tex.count("\\end{")
    body = tex.split("\\midrule")[1].split("\\bottomrule")[0]
    assert all(len(re.findall(r"(?<!\\)&", l)) == t.rows.shape[1] for l in body.strip().splitlines())
    assert not re.search(r"(?<!\\)[%#_]", body) and not set(body) & set("↑↓λ±—–"), "nothing that LaTeX would misread"


# ---- the notebooks
def execute(path, **parameters):
    "A figure notebook's cells in this process; test_notebooks.py starts the kernels"
    scope = {"display": print}
    for cell in code_cells(path):
        exec(compile(cell.source, f"{path.name}", "exec"), scope)
        if "parameters" in cell.metadata.get("tags", []): scope.update(parameters)
    plt.close("all")


def test_every_table_of_the_paper_has_a_notebook():
    assert {*TABLES} == {*tables.TABLE_TEXTS} and {*TABLES, "table3_lambda"} == {*paper.PRINTED_TABLES}


def test_an_unknown_table_is_one_line(full):
    with pytest.raises(UserError, match="table4 is no table of this notebook; use table1_known, "): execute(DRAWINGS["table1_known"][0], runs=str(full), table="table4")


@pytest.mark.parametrize("name", FULL)
def test_notebooks_with_everything_there(name, full, tmp_path, capsys):
    "What old folders show is test_results.py's part."
    path, parameters = DRAWINGS[name]
    one = {} if name.startswith("table") and name != "table3_lambda" else dict(data="puppets + puppets-images")
    execute(path, runs=str(full), out=str(tmp_path), repeats=100, **one, **parameters)
    caption = (tmp_path/f"{name}.caption.txt").read_text()
    assert "n = 100" in caption and "2 seeds" in caption and "B = 0.7: seed 0, 1 missing" in capsys.readouterr().out
    if name.startswith("table"):
        assert "significant" in (tmp_path/f"{name}.html").read_text() and (tmp_path/f"{name}.differences.tex").exists() and "not comparable" in caption
    assert (tmp_path/"table1_attributes.csv").exists() == (name == "table1_known")
    if name == "table1_known": assert "frames: a0" in (tmp_path/"table1_attributes.csv").read_text() and "30.0" in (tmp_path/"table1_attributes.md").read_text()
    if name == "pareto": assert {"newest", "blur", "penalty, all B"} <= set(pd.read_csv(tmp_path/"pareto.hypervolume.csv").method)


def test_runs_without_predictions_say_so(tmp_path):
    for label, B in (("raw", float("inf")), ("B = 0.3", .3)): fake_run(tmp_path/"SYNTHETIC", label, B, method="raw" if label == "raw" else "penalty", predictions=False)
    t = tables.make_table("table1_known", tmp_path/"SYNTHETIC")
    assert (t.differences == "no predictions stored").all(axis=None) and t.differences.size and "no predictions stored" in t.caption
    assert t.rows.loc["raw", "UCF101 Top-1 % ↑"] != "—" and set(t.rows["PA-HMDB Top-1 % ↑"]) == {"—"}
    tables.publish_table(tmp_path, t)
    assert not t.compared and not list(tmp_path.glob("*.differences.*")), "nothing is exported that nothing was compared for"
