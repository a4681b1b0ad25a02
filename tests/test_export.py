"Exported files answer as PyTorch does, refuse to be anything else, and a student imitates its teacher."
import json, subprocess, sys
import numpy as np
import pytest, torch
from penaltyanon.edge import export
from penaltyanon.nets.anonymizers import UNet, UNetPP, freeze_batchnorm, load_anonymizer, save_anonymizer
from penaltyanon.cli import main
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.train.distill import DistillOptions, distill, endless_frames, fidelity, train_student, sample_frames
from penaltyanon.edge.export import export_onnx, frame_difference, onnx_anonymizer, torch_anonymizer
from penaltyanon.edge.guards import probe_frames
from penaltyanon.nets.student import TinyNet

torch.set_num_threads(1)


def moved(widths=(4, 6, 8)):
    "A student that is not the identity"
    torch.manual_seed(0)
    net = TinyNet(widths)
    for p in net.head.parameters(): p.data += 0.1 * torch.randn_like(p)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def model(folder): return save_anonymizer(folder/"model.safetensors", moved(), {"B": 0.5})


@pytest.fixture(scope="module")
def file(folder, model):
    export_onnx(model, folder/"model.onnx", frames=probe_frames(3, 32, 48))
    return folder/"model.onnx"


NETS = {"TinyNet": moved, "UNetPP": lambda: freeze_batchnorm(UNetPP((16, 8, 8, 8))).eval(), "UNet": lambda: freeze_batchnorm(UNet((32,))).eval()}


@pytest.mark.parametrize("name", NETS)
def test_a_file_answers_as_pytorch_does(name, tmp_path):
    net = NETS[name]()
    card = export_onnx(net, tmp_path/"a.onnx", frames=probe_frames(2, 32, 48))
    assert card["architecture"] == name and card["difference"]["max"] <= 1
    run, reference = onnx_anonymizer(tmp_path/"a.onnx", threads=1), torch_anonymizer(net)
    for n, h, w in [(1, 16, 16), (3, 33, 47), (2, 1, 1), (1, 15, 130)]:
        frames = np.random.default_rng(h).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
        out = run(frames)
        assert out.dtype == np.uint8 and out.shape == frames.shape
        assert frame_difference(out, reference(frames))["max"] <= 1, (n, h, w)


def test_a_frame_does_not_depend_on_its_neighbours(file):
    frames, run = probe_frames(4, 40, 56), onnx_anonymizer(file, threads=1)
    assert (run(frames) == np.concatenate([run(f[None]) for f in frames])).all()
    assert (run(frames[:, ::-1, :][:, ::-1]) == run(frames)).all(), "a view with strides of its own"


def test_int8_is_close_and_says_how_close(model, tmp_path):
    frames = probe_frames(6, 64, 64)
    card = export_onnx(model, tmp_path/"a.onnx", "int8", frames=frames)
    run, reference = onnx_anonymizer(tmp_path/"a.onnx", threads=1), torch_anonymizer(load_anonymizer(model)[0])
    again = frame_difference(np.concatenate([run(f[None]) for f in frames]), reference(frames))
    assert card["precision"] == run.card["precision"] == "int8" and 0 < again["mean"] < 3
    assert again["max"] <= card["difference"]["max"]
    export_onnx(model, tmp_path/"fp32.onnx", frames=frames)
    export_onnx(model, tmp_path/"b.onnx", "int8", frames=frames, traced=tmp_path/"fp32.onnx")
    assert (onnx_anonymizer(tmp_path/"b.onnx")(frames) == onnx_anonymizer(tmp_path/"a.onnx")(frames)).all(), "the same, without tracing again"
    import onnx
    ops = [n.op_type for n in onnx.load(str(tmp_path/"a.onnx")).graph.node]
    assert "DequantizeLinear" in ops and "BatchNormalization" not in ops


def test_the_card_says_where_a_file_comes_from(file, model):
    import hashlib
    card = onnx_anonymizer(file).card
    assert card["source_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert card["made"]["B"] == 0.5 and card["architecture"] == "TinyNet" and card["config"] == {"widths": [4, 6, 8]}
    json.dumps(card)


# ---- refused
def refused(data, path, reason):
    path.write_bytes(data)
    with pytest.raises(UserError, match=reason) as e: onnx_anonymizer(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_every_changed_file_is_refused(file, tmp_path):
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(data), 200):
        changed = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1:]
        refused(changed, tmp_path/"changed.onnx", "hash is wrong|no penaltyanon card")
    for cut in (0, 10, len(data)//2, len(data) - 1): refused(data[:cut], tmp_path/"cut.onnx", "hash is wrong|no penaltyanon card")
    refused(data + b"more", tmp_path/"more.onnx", "hash is wrong")
    refused(data + data, tmp_path/"twice.onnx", "hash is wrong")


def test_a_file_without_card_is_refused(file, tmp_path):
    import onnx
    model = onnx.load(str(file))
    del model.metadata_props[:]
    refused(model.SerializeToString(), tmp_path/"bare.onnx", "no penaltyanon card")
    refused(b"", tmp_path/"empty.onnx", "no penaltyanon card")
    with pytest.raises(UserError, match="no such file"): onnx_anonymizer(tmp_path/"none.onnx")
    with pytest.raises(UserError, match="cannot be read"): onnx_anonymizer(tmp_path)


def test_a_sealed_file_that_is_no_network_is_refused(tmp_path):
    from penaltyanon.edge.export import _NO_CHECKSUM, _with_checksum
    refused(_with_checksum(b'text {"file_sha256": "%s"}' % _NO_CHECKSUM.encode()), tmp_path/"text.onnx", "onnxruntime cannot run it")


def test_wrong_frames_are_one_line(file):
    run = onnx_anonymizer(file)
    for frames in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)):
        with pytest.raises(UsageError, match="uint8 of shape"): run(frames)


def test_a_failed_export_leaves_nothing_but_the_old_file(file, tmp_path, monkeypatch):
    "A trace that answers otherwise than the network is not written; nor is anything when tracing breaks off."
    (tmp_path/"a.onnx").write_bytes(before := file.read_bytes())
    monkeypatch.setattr(export, "_trace", lambda f_A, path, opset: path.write_bytes(before))
    with pytest.raises(UserError, match="a.onnx: not written, differs from PyTorch by"): export_onnx(TinyNet(), tmp_path/"a.onnx", frames=probe_frames(2, 32, 32))
    monkeypatch.setattr(export, "_trace", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): export_onnx(TinyNet(), tmp_path/"a.onnx", frames=probe_frames(2, 32, 32))
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"] and (tmp_path/"a.onnx").read_bytes() == before


# ---- without PyTorch
def test_running_a_file_imports_no_pytorch(file):
    code = f"""import sys, numpy as np; from penaltyanon.edge.export import onnx_anonymizer
out = onnx_anonymizer({str(file)!r})(np.zeros((1, 20, 30, 3), np.uint8)); print(out.shape, [m for m in ("torch", "onnx", "scipy") if m in sys.modules])"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "(1, 20, 30, 3) []"


@pytest.mark.parametrize("module,extra", [("torch", "train"), ("onnxscript", "export")])
def test_what_is_not_installed_is_named_with_its_extra(module, extra, model, tmp_path):
    code = f"import sys; sys.modules[{module!r}] = None; from penaltyanon.cli import main; main(['export', {str(model)!r}, {str(tmp_path/'a.onnx')!r}])"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 1 and f'pip install "penaltyanon[{extra}]"' in r.stderr and r.stderr.count("\n") == 1, r.stderr


# ---- students
def test_a_student_learns_and_its_teacher_stays_as_it_was():
    teacher, student = moved((8, 8, 8)), TinyNet((8, 8, 8))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    losses = train_student(student, teacher, endless_frames("", 4, 32, 32), DistillOptions(steps=60), progress=False)
    assert np.mean(losses[-10:]) < np.mean(losses[:5])/2
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()) and all(p.grad is None for p in teacher.parameters())


def test_distilling_twice_gives_the_same_student(model, tmp_path):
    options = DistillOptions(steps=4, student="small", size=16, batch=2)
    for name in "ab": distill(model, tmp_path/f"{name}.safetensors", options, progress=False)
    (a, card), (b, _) = (load_anonymizer(tmp_path/f"{n}.safetensors") for n in "ab")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert card["teacher"] == "model.safetensors" and card["fidelity"]["frames"] == [12, 240, 320]


def test_fidelity_of_equals_and_of_nothing():
    frames, same = sample_frames("", 2, 24, 40), torch_anonymizer(moved())
    assert fidelity(same, same, frames)["l1"] == 0
    lazy = fidelity(lambda x: x, same, frames)
    assert lazy["moved"] == 0 < lazy["moved_by_teacher"] and lazy["l1"] > 1


# ---- the command line
def command(*args):
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    return e.value.code


def test_the_commands(model, tmp_path, capsys):
    assert command("distill", model, tmp_path/"s.safetensors", "--steps", 2, "--student", "small", "--size", 16, "--batch", 2) == 0
    assert command("export", tmp_path/"s.safetensors", tmp_path/"s.onnx", "--opset", 19) == 0
    assert onnx_anonymizer(tmp_path/"s.onnx").card["opset"] == 19
    assert "s.onnx: fp32, off by" in capsys.readouterr().out


@pytest.mark.parametrize("args,code,said", [
    (["export", "MODEL", "a.onnx", "--precision", "int4"], 2, "fp32, int8"), (["export", "none.safetensors", "a.onnx"], 1, "none.safetensors: no such file"),
    (["export", "MODEL", "a.onnx", "--opset", "9"], 2, "opset=9"), (["distill", "MODEL", "a.safetensors", "--student", "midium"], 2, "medium"),
])
def test_wrong_use_is_one_line(args, code, said, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(*[str(model) if a == "MODEL" else a for a in args]) == code
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
