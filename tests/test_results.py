"The committed results: complete, honest about their origin, and what README and docs/results.md say they are."
import re, time
import pytest
from conftest import DRAWINGS, ROOT
from penaltyanon.core.files import read_json
from penaltyanon.core.run_folder import finished_runs, read_manifests
from penaltyanon.results.report import INTERVAL_COLUMNS, load_frames, load_results, summarize_runs
from penaltyanon.results.tables import column_measurements, format_cell, load_measurements

SWEEPS = [p for p in sorted(ROOT.glob("runs/*")) if p.is_dir() and finished_runs(p)]
PAGE = (ROOT/"docs/results.md").read_text(encoding="utf-8")
name = lambda p: str(p.relative_to(ROOT))


def chapter(root):
    "What docs/results.md says of a sweep: from the first mention of its folder in a heading's text to the next heading"
    return PAGE[PAGE.index(f"penaltyanon report {root}"):].partition("\n## ")[0]


def table_below(text, head):
    "Cells of the first table whose header begins so, chance and base rates left out: (columns, row -> cells)"
    lines = [[c.strip() for c in line.strip("| ").split("|")] for line in text[text.index(head):].partition("\n\n")[0].splitlines()]
    return lines[0], {line[0]: line[1:] for line in lines[2:] if not line[0].startswith("chance")}


@pytest.mark.parametrize("root", SWEEPS, ids=name)
def test_every_run_says_how_it_was_made(root):
    for r in finished_runs(root):
        files = {p.name for p in r.path.iterdir()}
        assert {"params.yaml", "env.json", "data.json", "metrics.jsonl", "results.json", "DONE"} <= files, r.path
        s, found = r.settings, r.results
        assert found["seed"] == s.seed and found["method"] == s.method and found["action_data"] == s.action_data
        if s.method == "penalty" and s.penalty == "constraint":
            assert found["trainer"]["B"] == s.B == found["B"]
            steps = [row for row in r.metrics() if row["stage"] == "minimax"]
            assert len(steps) == found["trainer"]["steps"] // s.log_every


@pytest.mark.parametrize("root", SWEEPS, ids=name)
def test_every_run_names_its_data(root):
    "Runs of one sweep share the list of files where it is the same; `data.json` says where it lies."
    for r in finished_runs(root):
        data = read_manifests(r.path)
        assert {"actions", "images"} <= data.keys(), r.path
        assert all(len(data[part]["sha256"]) == 64 and data[part]["files"]["train"] for part in ("actions", "images")), r.path
        assert (r/"data.json").stat().st_size < 20_000, f"{r.path}: a list of files in each run"


def test_frames_are_kept_once():
    "As numbers, in frames.npz; what draws them needs no picture of its own."
    for r in (r for root in SWEEPS for r in finished_runs(root)):
        frames = load_frames(r.path)
        if frames: assert frames["raw"].shape == frames["anonymized"].shape and frames["raw"].dtype == "uint8" and not (r/"frames.png").exists(), r.path


# ---- what the pages say
def score_cells(r): return [f"{r[score]:.1f} [{r[lo]:.1f}, {r[hi]:.1f}]" for score, (lo, hi) in INTERVAL_COLUMNS.items()]


def line_of(label, r): return f"| {label} | {' | '.join(score_cells(r))} | {r.rms_clips:.2f} | {r.rms_images:.2f} | {r.seeds} |"


@pytest.mark.parametrize("root", SWEEPS, ids=name)
def test_the_page_tells_what_the_runs_hold(root):
    "In the chapter that names the folder; rows that share a label and differ in the weight are named with it."
    means, part = summarize_runs(load_results(root)), chapter(name(root))
    several = means.label[means.label.duplicated()].unique()
    for _, r in means.iterrows():
        label = f"{r.label}, λ = {r.lam:g}" if r.label in several else r.label
        rows = re.findall(rf"^\| {re.escape(label)} \|.*$", part, re.M)
        assert rows, f"docs/results.md has no row for {label} of {name(root)}"
        assert rows[0] == line_of(label, r)


def test_the_readme_tells_what_the_page_tells():
    "Its short table is part of the long one."
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    means = summarize_runs(load_results(ROOT/"runs/demo-reference")).set_index("label")
    _, rows = table_below(readme, "| | Top-1 % ↑")
    assert len(rows) >= 5
    for label in rows: assert line_of(label, means.loc[label]) in readme, label


def test_the_page_tells_what_further_networks_found():
    "Tables 5 and 7, number by number."
    columns = dict(zip("R3D-18 R(2+1)D-18 I3D-R50 MViTv2-S ResNet-18 ResNet-34 ResNet-50 ResNet-101 ResNet-152".split(),
                       "action-r3d18 action-r2plus1d18 action-i3d_r50 action-mvit_v2_s privacy-resnet18 privacy-resnet34 privacy-resnet50 privacy-resnet101 privacy-resnet152".split()))
    head, rows = table_below(chapter("runs/demo-attackers"), "| | R3D-18")
    runs = {r.results["label"]: r for r in finished_runs(ROOT/"runs/demo-attackers")}
    assert set(rows) == set(runs) and head == list(columns)
    for label, row in rows.items():
        for test, said in zip(columns.values(), row, strict=True):
            path = runs[label]/"tests"/f"{test}.json"
            assert said == ("—" if not path.exists() else f"{read_json(path)['top1' if test.startswith('action') else 'cmap']:.1f}"), (label, test)


@pytest.mark.parametrize("root, text, head, tests", [
    ("demo-reference", PAGE, "| | novel actions", ("novel-action", "novel-privacy", "raw-attacker", "raw-attacker-frames")),
    ("mini", chapter("runs/mini"), "| | hmdb51-mini", ("novel-action", "novel-privacy"))], ids=["puppets", "real clips"])
def test_the_page_tells_what_further_evaluations_found(root, text, head, tests):
    "Tables 2 and 6: mean and interval of every cell, and the number of its seeds where that differs from cell to cell."
    m, (_, rows) = load_measurements(ROOT/"runs"/root), table_below(text, head)
    for test, place in zip(tests, range(len(tests))):
        found = column_measurements(m, dict(test=test))
        assert set(found.row) == set(rows)
        for label, row in rows.items():
            seeds = found[found.row == label]
            said, _, count = row[place].partition(" (")
            assert format_cell(seeds, "Top-1").partition(" ±")[0] == said and count in ("", f"{seeds.seed.nunique()})"), (label, test)


@pytest.mark.parametrize("root", SWEEPS, ids=name)
@pytest.mark.parametrize("drawing", DRAWINGS)
def test_figures_rebuild_from_a_clone(root, drawing, tmp_path, run_notebook_steps):
    if drawing in ("fig2_frames", "story") and not list(root.rglob("frames.npz")): pytest.skip("no frames are kept here")
    path, parameters = DRAWINGS[drawing]
    for _ in run_notebook_steps(path, dict(runs=str(root), out=str(tmp_path), **parameters), tmp_path/path.name): time.sleep(0.05)
    assert list(tmp_path.glob(f"{drawing}.*"))
