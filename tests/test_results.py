"The committed results: complete, honest about their origin, and what the README says they are."
import re
import pytest
from conftest import FIGURES, ROOT
from penaltyanon import sweep
from penaltyanon.core import finished_runs
from penaltyanon.report import load_results, summary

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
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    part = readme[readme.index(f"penaltyanon report {name(root)}"):]
    for _, r in summary(load_results(root)).iterrows():
        label = re.escape(r.label)
        row = re.search(rf"^\| {label} \|.*$", part, re.M)
        assert row, f"README has no row for {r.label} of {name(root)}"
        for value in (r.top1, r.images_cmap, r.frames_cmap): assert f" {value:.1f}" in row[0], (row[0], value)


@pytest.mark.parametrize("root", SWEEPS, ids=name)
@pytest.mark.parametrize("figure", FIGURES, ids=lambda p: p.stem)
def test_figures_rebuild_from_a_clone(root, figure, tmp_path):
    if figure.stem in ("fig2_frames", "story") and not list(root.rglob("frames.npz")): pytest.skip("real people: no frames are kept")
    sweep.run_notebook(figure, dict(runs=str(root), out=str(tmp_path)), tmp_path/figure.name)
    assert list(tmp_path.glob(f"{figure.stem}.*"))
