"A file is judged like any other anonymizer, as the very file it was, or not at all."
import subprocess
from pathlib import Path
import pytest, torch
from penaltyanon.sweep import grid, jobs
from penaltyanon.edge import export
from penaltyanon.nets.anonymizers import load_anonymizer, save_anonymizer
from penaltyanon.core.files import UserError, file_hash
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.results.report import load_results
from penaltyanon.evaluate.files import open_anonymizer, open_exported
from penaltyanon.nets.student import TinyNet
from penaltyanon.results.tables import load_measurements
from conftest import BIN


def student(path, seed):
    torch.manual_seed(seed)
    net = TinyNet((8, 8, 8))
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return save_anonymizer(path, net, {})


def penaltyanon(*words, cwd): return subprocess.run([str(BIN/"penaltyanon"), *map(str, words)], capture_output=True, text=True, timeout=500, cwd=cwd)


def test_a_sweep_judges_files_and_notices_when_one_is_exchanged(tmp_path, run_job_steps, monkeypatch):
    student(tmp_path/"student.safetensors", 0)
    export.export_onnx(tmp_path/"student.safetensors", tmp_path/"int8.onnx", "int8", frames=export.probe_frames(8, 32, 32))
    monkeypatch.chdir(tmp_path)
    cells = grid.expand_grid("smoke", methods=("int8.onnx", "student.safetensors"))
    grid.prepare_data(cells[0])
    jobs.raise_failed(jobs.run_jobs(cells, Path("runs"), run_steps=run_job_steps))
    runs = {r.results["file"]["name"]: r for r in map(RunFolder.open, sorted(p.parent for p in tmp_path.glob("runs/*/DONE")))}
    assert set(runs) == {"int8.onnx", "student.safetensors"}
    for name, run in runs.items():
        assert run.results["file"]["sha256"] == file_hash(tmp_path/name) and run.results["method"] == "file" and run.results["trainer"] is None
        assert run.results["label"] == f"{name.split('.')[0]} {file_hash(tmp_path/name)[:6]}" and run.results["rms"]["clips"]["std"] > 0.05
        assert not (run/"anonymizer.safetensors").exists(), "nothing is copied that may not be"
    assert set(load_results(tmp_path/"runs").label) == {r.results["label"] for r in runs.values()}
    assert load_measurements(tmp_path/"runs").networks.str.startswith("TinyNet").all()

    student(tmp_path/"student.safetensors", 1)              # the same name, another network
    later = penaltyanon("attack", "runs", "--protocol", "table6-pretrained-attacker", "--world", "puppets", "--tests", "raw-attacker", "--data-set",
                        "vispr1=puppets-images:data/puppets-smoke", "ucf101=puppets:data/puppets-smoke", "--retries", 0, cwd=tmp_path)
    assert later.returncode == 1 and "no longer the file this run was begun with" in later.stderr, later.stderr
    assert {r.path.name for r in runs.values() if (r/"tests"/"raw-attacker.json").exists()} == {runs["int8.onnx"].path.name}
    again = grid.expand_grid("smoke", methods=(str(tmp_path/"student.safetensors"),))[0]
    assert again.anonymizer_weights.endswith(file_hash(tmp_path/"student.safetensors")[:12]) and again.anonymizer_weights not in [r.settings.anonymizer_weights for r in runs.values()]


def test_the_command_line_takes_files_beside_methods(tmp_path, monkeypatch):
    from penaltyanon import cli
    asked = []
    monkeypatch.setattr(cli, "run_grid", lambda cells, out, *a, **k: asked.extend(cells) or [])
    path = student(tmp_path/"student.safetensors", 0)
    with pytest.raises(SystemExit) as e: cli.main(["sweep", "--preset", "smoke", "--methods", str(path), "blur-weak", "--out", str(tmp_path/"runs")])
    assert e.value.code in (0, None) and [s.method for s in asked] == ["file", "blur-weak"] and asked[0].anonymizer_weights == f"{path}#{file_hash(path)[:12]}"


@pytest.mark.parametrize("word, code, says", [("none.onnx", 1, "none.onnx: no such file"), ("blurr", 2, "is unknown"), ("file", 2, "is unknown")])
def test_what_is_no_anonymizer_is_one_line(tmp_path, word, code, says):
    r = penaltyanon("sweep", "--preset", "smoke", "--methods", word, "--out", "runs", cwd=tmp_path)
    assert r.returncode == code and says in r.stderr and len(r.stderr.strip().splitlines()) == 1 and not (tmp_path/"runs").exists()


@pytest.mark.parametrize("height, width", [(1, 1), (7, 33), (48, 64)])
def test_any_size_and_the_answer_of_the_network(tmp_path, height, width):
    path = student(tmp_path/"student.safetensors", 2)
    x, net = torch.rand(3, 3, height, width), load_anonymizer(path)[0]
    with torch.no_grad(): y, exact = open_exported(f"{path}#{file_hash(path)[:12]}")[0](x), net(((255*x).round()/255)).clamp(0, 1)
    assert y.shape == x.shape and (y - exact).abs().max() <= 0.51/255
    with pytest.raises(UserError, match="no longer the file"): open_exported(f"{path}#{'f'*12}")


@pytest.mark.parametrize("kind", ["blur-strong", "pixelate@whole", "safetensors", "onnx"])
def test_one_door_for_every_anonymizer(tmp_path, kind):
    "Names, checkpoints and exported files come back under one contract: frames in, frames of the same shape out, in [0, 1]."
    path = student(tmp_path/"student.safetensors", 3)
    if kind == "onnx": export.export_onnx(path, tmp_path/"student.onnx", frames=export.probe_frames(8, 32, 32))
    f_A, x = open_anonymizer({"safetensors": path, "onnx": tmp_path/"student.onnx"}.get(kind, kind), "cpu"), torch.rand(2, 3, 40, 56)
    with torch.no_grad(): y = f_A(x)
    assert not f_A.training and y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and (y - x).abs().mean() > 0.01
    if kind in ("safetensors", "onnx"): assert (y - open_exported(path)[0](x)).abs().max() <= 2.5/255


@pytest.mark.parametrize("spec, says", [("raw", "nearly the identity"), ("vita", "is trained first"), ("blur-strng", "did you mean"), ("nowhere.onnx", "no such file")])
def test_the_door_refuses_what_the_command_refuses(spec, says):
    with pytest.raises(UserError, match=says) as e: open_anonymizer(spec)
    assert "\n" not in str(e.value)
