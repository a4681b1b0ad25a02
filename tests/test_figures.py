"Figures and the report rebuild from run folders alone and say what is missing. All runs in here are SYNTHETIC."
import re, shutil, subprocess, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.image, matplotlib.pyplot as plt, pytest
from penaltyanon.results import report
from penaltyanon.core.files import UserError, read_json
from penaltyanon.sweep.notebooks import run_notebook
from conftest import DRAWINGS, ROOT, code_cells
from synthetic import fake_run, fake_sweep


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A sweep with a hole: B = 0.5 lacks seed 1, and one run is unfinished."
    root = fake_sweep(tmp_path_factory.mktemp("SYNTHETIC")/"sweep", seeds=(0, 1))
    shutil.rmtree(root/"penalty-B=0.5-s1-synthetic")
    fake_run(root, "B = 0.2", 0.2, 0, (1., 1.), done=False)
    said = subprocess.run([sys.executable, "-m", "penaltyanon.cli", "report", str(root)], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    (root.parent/"said").write_text(said.stdout)
    return root


def printed(path): return "".join("".join(o.get("text", "")) for c in read_json(path)["cells"] for o in c.get("outputs", []))


def test_every_figure_is_drawn_and_says_n_and_seeds(page):
    assert {*DRAWINGS} - {"story"} == {*report.MAIN_FIGURES, *report.EXTRA_FIGURES}      # the story is a notebook to read, no part of the page
    for name in report.MAIN_FIGURES:
        caption = (page/"_figures"/f"{name}.caption.txt").read_text()
        assert "n = 160 test clips, 300 test images" in caption and "2 seeds" in caption
        if not name.startswith(("table", "judging")): assert (page/"_figures"/f"{name}.png").stat().st_size > 2000
        else: assert all(label in (page/"_figures"/f"{name}.html").read_text() for label in ("raw", "oracle", "B = 0.3"))
    for png in page.glob("_figures/*.png"): assert min(matplotlib.image.imread(png).shape[:2]) > 300


def test_holes_are_named_in_every_figure_notebook_and_on_the_page(page):
    for name in report.MAIN_FIGURES:
        said = printed(page/"_figures"/f"{name}.ipynb")
        assert "B = 0.5: seed 1 missing" in said and "begun, not finished" in said, name
    html = (page/"report.html").read_text()
    assert "B = 0.5: seed 1 missing" in html and "B = 0.2" not in html.replace("penalty-B=0.2", "")


def test_the_command_prints_a_table_and_where_the_page_is(page):
    said = (page.parent/"said").read_text()
    assert said.splitlines()[-1] == f"report: {page/'report.html'}"
    assert "B = 0.3" in said and "oracle" in said and "97.0 [95.0, 99.0]" in said


def test_the_page_needs_nothing_else(page):
    html = (page/"report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html) and html.count("data:image/png;base64") == 5
    assert "not comparable" in html and "2 seeds" in html


def test_figures_come_out_the_same_twice(page, tmp_path):
    run_notebook("figures/fig3_penalty", dict(runs=str(page), out=str(tmp_path)), tmp_path/"again.ipynb")
    assert (tmp_path/"fig3_penalty.png").read_bytes() == (page/"_figures"/"fig3_penalty.png").read_bytes()


def test_runs_without_frames_or_attributes_still_make_a_page(tmp_path):
    "Real people: no frames kept. Clips without attributes: no third panel."
    for label, method in (("raw", "raw"), ("B = 0.3", "penalty")): fake_run(tmp_path/"SYNTHETIC", label, 0.3, 0, (90., 80.), method, frames=False)
    for f in tmp_path.rglob("frames.npz"): f.unlink()
    html = report.write_report(tmp_path/"SYNTHETIC").read_text()
    assert "real people are not shown" in html and html.count("data:image/png;base64") == 3 and "More frames" not in html
    table = report.results_table(report.load_results(tmp_path/"SYNTHETIC"))
    assert table.loc["B = 0.3", "cMAP % ↓ action frames"] == "–"


def test_one_seed_has_no_spread_and_several_have(tmp_path):
    one = report.results_table(report.load_results(fake_sweep(tmp_path/"SYNTHETIC1", seeds=(0,))))
    two = report.results_table(report.load_results(fake_sweep(tmp_path/"SYNTHETIC2", seeds=(0, 1))))
    assert "±" not in one.loc["B = 0.9", "Top-1 % ↑"] and "±" in two.loc["B = 0.9", "Top-1 % ↑"]


def test_games_on_different_data_never_share_a_row(tmp_path):
    "UCF101 at 78 and HMDB51 at 40 are two rows, two curves and two figures; never 59."
    root = tmp_path/"SYNTHETIC"
    for data, top1 in (("ucf101", 78.), ("hmdb51", 40.)):
        for label, B in (("raw", float("inf")), ("B = 0.3", .3)): fake_run(root/data, label, B, 0, (top1, 60.), "raw" if label == "raw" else "penalty", action_data=f"{data}:/data/{data}", privacy_data="vispr1:/v")
    df = report.load_results(root)
    table = report.results_table(df)
    assert table.loc["B = 0.3, ucf101 + vispr1", "Top-1 % ↑"].startswith("78.0") and table.loc["B = 0.3, hmdb51 + vispr1", "Top-1 % ↑"].startswith("40.0")
    assert sorted(report.summarize_runs(df).query("label == 'B = 0.3'").top1) == [40., 78.] and not table["Top-1 % ↑"].str.contains("59").any()
    assert "hmdb51 + vispr1: λ = 0: seed 0 missing" in report.missing_runs(df)
    html = report.write_report(root, jobs=1).read_text()
    for name in df.data.unique(): assert f"Utility and leakage against the bound B ({name})" in html
    assert "different data" not in html and "59.0" not in html


@pytest.mark.parametrize("preset, names", [("paper", ("UNet++", "I3D ResNet-50", "two views")), ("demo", ("UNet++", "small 3D ResNet", "two views"))])
def test_the_diagrams_name_the_networks_of_a_preset(preset, names, tmp_path):
    "Figures 1 and 4, as vectors, the same bytes twice."
    drawn = []
    for out in (tmp_path/"one", tmp_path/"two"):
        scope = {}
        for cell in code_cells(ROOT/"nbs/figures/diagrams.ipynb"):
            exec(compile(cell.source, "diagrams", "exec"), scope)
            if "parameters" in cell.metadata.get("tags", []): scope.update(preset=preset, out=str(out))
        plt.close("all")
        drawn.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert drawn[0] == drawn[1] and set(drawn[0]) == {f"{n}.{e}" for n in ("fig1_framework_step1", "fig1_framework_step2", "fig4_contrastive") for e in ("svg", "png")}
    texts = " ".join(t.get_text().replace("\n", " ") for figure in scope["drawn"].values() for t in figure.findobj(matplotlib.text.Text))
    for name in names: assert name in texts, name


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no finished run"): report.write_report(tmp_path)
