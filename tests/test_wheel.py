"The wheel, built from the source distribution, in two empty environments: for a camera (small, by pip) and for training (all of it)."
import os, shutil, subprocess, zipfile
from importlib.metadata import distribution
import pytest
from packaging.requirements import Requirement
from conftest import FIGURES, ROOT, RUNS, python, run

PACKAGE = ROOT/"penaltyanon"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_"))
ON_A_CAMERA = ("cli", "core.files", "core.machine", "core.settings", "core.run_folder", "data.video", *(m for m in MODULES if m.startswith("edge.")))
CAMERA_MB = 350


@pytest.fixture(scope="module")
def dist(tmp_path_factory, module_tree):
    "A wheel made from the source distribution, so both are tested."
    out = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", out, module_tree)
    return out


def test_no_weights_are_bundled(dist):
    "Whatever their licence: weights lie in the user's cache. The list of the mini sets is names and digits."
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z: sizes = {i.filename: i.file_size for i in z.infolist()}
    kinds = (".safetensors", ".onnx", ".pth", ".pt", ".bin", ".npz", ".tflite", ".torch")
    body = "penaltyanon/avatar/body.npz"       # a mesh in the public domain, no weights
    assert not [n for n, size in sizes.items() if n.endswith(kinds) and n != body or size > 2**20 and not n.endswith(".ipynb")]
    assert "penaltyanon/data/mini.txt" in sizes and "penaltyanon/avatar/body.npz" in sizes


def empty(folder, *install):
    "The interpreter of a new environment that holds nothing, not even pip, but what is installed."
    python("-m", "venv", "--without-pip", folder/"venv")
    python("-m", "pip", "--python", folder/"venv/bin/python", "install", "-q", *install)
    return folder/"venv/bin/python"


@pytest.fixture(scope="module")
def edge(tmp_path_factory, dist):
    "The wheel with [edge], and what pip installs for it."
    folder = tmp_path_factory.mktemp("edge")
    yield empty(folder, "--no-compile", "-c", ROOT/"constraints.txt", f"{next(dist.glob('*.whl'))}[edge]")
    shutil.rmtree(folder)


def closure(asked):
    "The distributions that (requirement, extra) ask for, and those ask for in turn, as pip would take them."
    found, extras, todo = {}, {}, list(asked)
    while todo:
        need, extra = Requirement(todo[-1][0]), todo.pop()[1]
        if need.marker and not need.marker.evaluate({"extra": extra}): continue
        d = found.setdefault(need.name, distribution(need.name))
        assert need.specifier.contains(d.version, prereleases=True), f"{need}: {d.version} is here"
        new = {"", *need.extras} - extras.setdefault(need.name, set())
        extras[need.name] |= new
        todo += [(r, e) for e in new for r in d.requires or ()]
    return found.values()


@pytest.fixture(scope="module")
def train(tmp_path_factory, dist):
    "The same with [train], but what the wheel asks for (6 GB) is not copied: the environment has links to just that part of ours."
    folder = tmp_path_factory.mktemp("train")
    made = empty(folder, "--no-deps", next(dist.glob("*.whl")))
    site = next(folder.glob("venv/lib/python*/site-packages"))
    asked = inside(made, "import importlib.metadata as m; print('\\t'.join(m.requires('penaltyanon')))", folder).split("\t")
    for d in closure((r, e) for r in asked for e in ("", "train")):
        for top in {f.parts[0] for f in d.files} - {"..", "__pycache__"}:
            if not (site/top).exists(): os.symlink(d.locate_file(top), site/top)
    return made


def inside(python, code, cwd): return run(python, "-I", "-c", code, cwd=cwd).strip().split("\n")[-1]


def found(python, cwd, *modules): return inside(python, f"import importlib.util as u; print([m for m in {modules} if u.find_spec(m)])", cwd)


def test_the_wheel_installs_into_an_empty_environment(edge, tmp_path):
    where = inside(edge, "import penaltyanon; print(penaltyanon.__file__, penaltyanon.__version__)", tmp_path)
    assert str(edge.parents[1]) in where and where.endswith(" 0.1.0")
    python("-m", "pip", "--python", edge, "check")


# ---- penaltyanon[edge]: what a camera needs, and no more
def test_a_camera_gets_no_pytorch_and_little_else(edge, tmp_path):
    assert found(edge, tmp_path, "torch", "onnx", "scipy", "pandas", "matplotlib", "sklearn", "cv2", "papermill", "nbdev") == "[]"
    site = next(edge.parents[1].glob("lib/python*/site-packages"))
    mb = sum(f.stat().st_size for f in site.rglob("*") if f.is_file())/1e6
    print(f"penaltyanon[edge]: {mb:.0f} MB installed")
    assert mb < CAMERA_MB


@pytest.mark.parametrize("module", ON_A_CAMERA)
def test_a_camera_imports(edge, module, tmp_path): inside(edge, f"import penaltyanon.{module}", tmp_path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A student that inverts its frames, exported by the environment of this test"
    import torch
    from penaltyanon.edge.export import export_onnx
    from penaltyanon.edge.guards import probe_frames
    from penaltyanon.nets.student import TinyNet
    net = TinyNet((4, 4, 4))
    net.head.bias.data = torch.tensor([-1.0]*12 + [1.0]*12)
    export_onnx(net, path := tmp_path_factory.mktemp("exported")/"invert.onnx", frames=probe_frames(2, 32, 32))
    return path


def test_a_camera_anonymizes_frames(edge, exported, tmp_path):
    code = f"""import sys, numpy as np; from penaltyanon.edge.export import onnx_anonymizer
frames = np.random.default_rng(0).integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
print(np.abs(onnx_anonymizer({str(exported)!r})(frames).astype(int) + frames - 255).max())"""
    assert inside(edge, code, tmp_path) in "01"


CLIP = """import av, numpy as np
with av.open("clip.mp4", "w") as video:
    stream = video.add_stream("mpeg4", rate=25); stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for i in range(12): video.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8), format="rgb24")))
    video.mux(stream.encode())"""
MEANS = "import av; print([round(float(f.to_ndarray(format='rgb24').mean())) for f in av.open('out.mp4').decode(video=0)])"


def test_a_camera_anonymizes_a_clip(edge, exported, tmp_path):
    inside(edge, CLIP, tmp_path)
    run(edge.parent/"penaltyanon", "anonymize", "clip.mp4", "out.mp4", "--model", exported, cwd=tmp_path)
    means = eval(inside(edge, MEANS, tmp_path))
    assert len(means) == 12 and all(abs(m - (255 - 10*i)) < 6 for i, m in enumerate(means)), means


def test_what_needs_pytorch_says_so_in_one_line(edge, tmp_path):
    r = subprocess.run([edge.parent/"penaltyanon", "export", "a.safetensors", "a.onnx"], cwd=tmp_path, capture_output=True, text=True)
    assert (r.returncode, r.stderr) == (1, 'error: this needs torch, which is not installed; pip install "penaltyanon[train]"\n')


# ---- penaltyanon[train]: the library, without the tools we write with
def test_the_tools_we_write_with_are_not_needed(train, tmp_path):
    python("-m", "pip", "--python", train, "check")
    assert found(train, tmp_path, "nbdev", "papermill", "jupyterlab", "fastcore", "execnb", "IPython", "onnx", "onnxruntime") == "[]"


IMPORT_EACH = """import os, sys, torch, torchvision, segmentation_models_pytorch, sklearn.metrics, pandas    # once; each module then in a fork that has none of ours
failed = []
for m in %r:
    if (pid := os.fork()) == 0:
        try: __import__(f"penaltyanon.{m}")
        except BaseException as e: print(m, repr(e), flush=True); os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]: failed.append(m)
print(failed)"""


def test_every_module_imports(train, tmp_path):
    "Each alone, whatever the others import."
    said = run(train, "-I", "-c", IMPORT_EACH % MODULES, cwd=tmp_path)
    assert said.strip().split("\n")[-1] == "[]", said


@pytest.mark.parametrize("which", ["edge", "train"])
def test_the_command_line_answers(which, request, tmp_path):
    said = run(request.getfixturevalue(which).parent/"penaltyanon", "--help", cwd=tmp_path)
    assert all(command in said for command in ("demo", "sweep", "report", "anonymize", "export"))


def test_the_notebooks_of_a_run_are_in_the_wheel(edge, tmp_path):
    code = "import penaltyanon, pathlib; print(sorted(p.stem for p in (pathlib.Path(penaltyanon.__file__).parent/'nbs').rglob('*.ipynb')))"
    assert inside(edge, code, tmp_path) == str(sorted(p.stem for p in [*RUNS, *FIGURES]))


RUN_CELLS = """import json, matplotlib
from penaltyanon.sweep.notebooks import find_notebook
matplotlib.use("Agg")
path, space = find_notebook("runs/%s"), {"__name__": "__main__", "display": print}
assert "site-packages" in str(path), path
for cell in json.load(open(path))["cells"]:
    if cell["cell_type"] == "code": exec("".join(cell["source"]), space)"""


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_the_run_notebooks_run_as_they_are_from_the_wheel(train, path, tmp_path):
    "In a folder of the user's own, with nothing but penaltyanon[train]."
    run(train, "-I", "-c", RUN_CELLS % path.stem, cwd=tmp_path)
    assert (tmp_path/"data/puppets-smoke").is_dir()
