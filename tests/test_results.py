"The committed results: complete, honest about their origin, and what the README says they are."
import re, time
import pytest
from conftest import FIGURES, ROOT
from penaltyanon.core.files import read_json
from penaltyanon.core.run_folder import finished_runs
from penaltyanon.results.report import INTERVAL_COLUMNS, load_results, summarize_runs

SWEEPS = [p for p in sorted(ROOT.glob("runs/*")) if p.is_dir() and finished_runs(p)]
name = lambda p: str(p.relative_to(ROOT))


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
def test_the_readme_tells_what_the_runs_hold(root):
    "In the section that names the folder; rows that share a label and differ in the weight are named with it."
    readme, cells = (ROOT/"README.md").read_text(encoding="utf-8"), summarize_runs(load_results(root))
    part = readme[readme.index(f"penaltyanon report {name(root)}"):].partition("\n### ")[0]
    several = cells.label[cells.label.duplicated()].unique()
    for _, r in cells.iterrows():
        label = f"{r.label}, λ = {r.lam:g}" if r.label in several else r.label
        rows = re.findall(rf"^\| {re.escape(label)} \|.*$", part, re.M)
        assert rows, f"README has no row for {label} of {name(root)}"
        scores = [f"{r[v]:.1f} [{r[lo]:.1f}, {r[hi]:.1f}]" for v, (lo, hi) in INTERVAL_COLUMNS.items()]
        assert rows[0] == f"| {label} | {' | '.join(scores)} | {r.rms_clips:.2f} | {r.rms_images:.2f} | {r.seeds} |"


def test_the_readme_tells_what_further_attackers_found():
    "Tables 5 and 7 of the README, number by number."
    root, part = ROOT/"runs"/"demo-attackers", (ROOT/"README.md").read_text(encoding="utf-8").partition("penaltyanon report runs/demo-attackers")[2].partition("\n### ")[0]
    head, *lines = [[c.strip() for c in l.strip("| ").split("|")] for l in part[part.index("| | R3D-18"):].partition("\n\n")[0].splitlines()]
    names = dict(zip("R3D-18 R(2+1)D-18 I3D-R50 MViTv2-S ResNet-18 ResNet-34 ResNet-50 ResNet-101 ResNet-152".split(),
                     "action-r3d18 action-r2plus1d18 action-i3d_r50 action-mvit_v2_s privacy-resnet18 privacy-resnet34 privacy-resnet50 privacy-resnet101 privacy-resnet152".split()))
    runs, rows = {r.results["label"]: r for r in finished_runs(root)}, {l[0]: l[1:] for l in lines[1:]}
    assert set(rows) == set(runs) and head == list(names)
    for label, row in rows.items():
        for test, said in zip(names.values(), row, strict=True):
            path = runs[label]/"tests"/f"{test}.json"
            assert said == ("—" if not path.exists() else f"{read_json(path)['top1' if test.startswith('action') else 'cmap']:.1f}"), (label, test)


@pytest.mark.parametrize("root", SWEEPS, ids=name)
@pytest.mark.parametrize("figure", FIGURES, ids=lambda p: p.stem)
def test_figures_rebuild_from_a_clone(root, figure, tmp_path, run_notebook_steps):
    if figure.stem in ("fig2_frames", "story") and not list(root.rglob("frames.npz")): pytest.skip("no frames are kept here")
    for _ in run_notebook_steps(figure, dict(runs=str(root), out=str(tmp_path)), tmp_path/figure.name): time.sleep(0.05)
    assert list(tmp_path.glob(f"{figure.stem}.*"))
