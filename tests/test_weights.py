"Weights that can be had: from a Python and a JavaScript index on this machine, checked, converted, kept whole or not at all."
import hashlib, io, json, shutil, subprocess, sys, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest, torch
from conftest import ROOT, SHARED, code_cells
from penaltyanon.core.files import UsageError, UserError, file_hash
from penaltyanon.data.mini import make_mini_set, read_mini_list
from penaltyanon.data.sources import open_data
from penaltyanon.nets import catalog, tflite
from penaltyanon.nets.catalog import CATALOG, INPUTS, WeightsEntry, add_weights, fetch_entries, find_kept, open_network, weights_path
from penaltyanon.nets.recognizers import PRIVACY_MODELS, build_model
from penaltyanon.nets.tfjs import TfjsNetwork, load_graph

GRAPH = dict(
    modelTopology=dict(node=[
        dict(name="x", op="Placeholder", attr=dict(dtype={"type": "DT_FLOAT"}, shape={"shape": {"dim": [{"size": s} for s in ("-1", "2", "2", "3")]}})),
        dict(name="axes", op="Const", attr={}), dict(name="mean", op="Mean", input=["x", "axes"], attr={})]),
    weightsManifest=[dict(paths=["toy.bin"], weights=[dict(name="axes", shape=[2], dtype="int32")])])
FILES = {"package/models/toy.json": json.dumps(GRAPH).encode(), "package/models/toy.bin": np.int32([1, 2]).tobytes(), "package/LICENSE": b"do what you like"}


def sha(data): return hashlib.sha256(data).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache, a list with two entries of ours, and no way to a real index."
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"cache"))
    for name, value in dict(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path/"wheels"), PIP_CONFIG_FILE="/dev/null", npm_config_registry="http://127.0.0.1:9").items(): monkeypatch.setenv(name, value)
    files = {n: sha(FILES[n]) for n in list(FILES)[:2]}
    monkeypatch.setitem(CATALOG, "toy", WeightsEntry("toy", "tests", "npm:toy@1.0.0", files, "MIT", "us", 0, notices=("package/LICENSE",)))
    monkeypatch.setitem(CATALOG, "face", WeightsEntry("face", "tests", "pip:face==1.0", {"face/net.onnx": sha(b"net")}, "MIT", "faces of strangers", 0, "research", ("face/LICENSE",)))
    return tmp_path/"cache"


def serve(answer):
    "A web server on this machine; `answer(path) -> (bytes, announced length)`."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data, length = answer(self.path, self.headers["Host"])
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(length)); self.end_headers()
            if data: self.wfile.write(data)
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def packed(files):
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            for name, data in files.items():
                info = tarfile.TarInfo(name); info.size = len(data)
                t.addfile(info, io.BytesIO(data))
        return out.getvalue()


def registry(archive, announced=None):
    "An index with one package."
    def answer(path, host):
        if path.endswith(".tgz"): return archive, announced or len(archive)
        about = dict(name="toy", version="1.0.0", dist=dict(tarball=f"http://{host}/toy-1.0.0.tgz", shasum=hashlib.sha1(archive).hexdigest()))
        page = about if path.rstrip("/").endswith("1.0.0") else {"name": "toy", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": about}}
        data = json.dumps(page).encode()
        return data, len(data)
    return serve(answer)


@pytest.fixture(params=["npm", "without npm"])
def use_registry(request, monkeypatch, tmp_path):
    "Points the JavaScript client at a server."
    if request.param == "npm" and not shutil.which("npm"): pytest.skip("npm is not installed")
    def use(server):
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("npm_config_cache", str(tmp_path/"npm"))
        for name, value in dict(fetch_retries="0", ignore_scripts="true").items(): monkeypatch.setenv(f"npm_config_{name}", value)
        if request.param != "npm":
            real = shutil.which
            monkeypatch.setattr(catalog.shutil, "which", lambda name: None if name == "npm" else real(name))
        return server
    return use


def make_wheel(folder, net=b"net"):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder/"face-1.0-py3-none-any.whl", "w") as z:
        for name, text in {"face/net.onnx": net, "face/LICENSE": "yours", "face-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: face\nVersion: 1.0\n",
                           "face-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "face-1.0.dist-info/RECORD": ""}.items(): z.writestr(name, text)


def test_a_graph_from_the_javascript_index_becomes_a_network(cache, use_registry, monkeypatch):
    server = use_registry(registry(packed(FILES)))
    path, = fetch_entries(["toy"])
    assert path == cache/"toy"/"toy.safetensors" and (cache/"toy"/"LICENCE-0.txt").read_text() == "do what you like"
    assert json.loads((cache/"toy"/"source.json").read_text())["sha256"] == file_hash(path)
    server.shutdown(); server.server_close()                               # from now on there is no network
    assert fetch_entries(["toy"], offline=True) == [path] == [weights_path("toy")]
    monkeypatch.setitem(INPUTS, "toy", dict(bgr=True, embedding="mean"))
    frames = torch.rand(5, 3, 2, 2)
    assert torch.allclose(open_network("toy").features(frames), frames.flip(1).mean((2, 3)))
    monkeypatch.setenv("npm_config_cache", str(cache.parent/"another"))     # npm remembers what it downloaded
    with pytest.raises(UserError, match="toy@1.0.0: cannot be downloaded"): fetch_entries(["toy"], again=True)
    assert path.is_file(), "a failure does not lose what was there"


def test_a_changed_file_is_refused(cache, use_registry):
    use_registry(registry(packed(FILES | {"package/models/toy.bin": np.int32([1, 1]).tobytes()})))
    with pytest.raises(UserError, match="the sha256 of package/models/toy.bin begins with .*nothing was kept"): fetch_entries(["toy"])
    assert not list(cache.glob("*"))


def test_a_download_that_ends_early_leaves_nothing(cache, use_registry):
    archive = packed(FILES)
    use_registry(registry(archive[:len(archive) // 2], len(archive)))
    with pytest.raises(UserError, match="toy") as e: fetch_entries(["toy"])
    assert "\n" not in str(e.value) and not list(cache.glob("*"))


def test_research_only_is_refused_before_anything_is_downloaded(cache, tmp_path, monkeypatch):
    make_wheel(tmp_path/"wheels")
    asked = []
    monkeypatch.setattr(catalog, "download_package", lambda *args: asked.append(args))
    with pytest.raises(UserError, match="face: for research only .faces of strangers.; if that is your use, say --allow-licences research"): fetch_entries(["toy", "face"])
    with pytest.raises(UserError, match="for research only"): fetch_entries(["face"], allowed=("MIT",))
    assert not asked
    monkeypatch.undo()


def call(*args):
    return subprocess.run([sys.executable, "-m", "penaltyanon.cli", "weights", *map(str, args)], capture_output=True, text=True)


def test_a_wheel_from_the_python_index(cache, tmp_path):
    make_wheel(tmp_path/"wheels")
    path, = fetch_entries(["face"], ("research",))
    assert path.read_bytes() == b"net" and (cache/"face"/"LICENCE-0.txt").read_text() == "yours"
    make_wheel(tmp_path/"wheels", b"other")
    with pytest.raises(UserError, match="nothing was kept"): fetch_entries(["face"], ("research",), again=True)
    assert path.read_bytes() == b"net"


def test_a_cache_that_cannot_be_written_is_one_line(cache, tmp_path):
    make_wheel(tmp_path/"wheels")
    cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match=f"{cache}: cannot be written .*; set PENALTYANON_WEIGHTS"): fetch_entries(["face"], ("research",))


def test_a_folder_that_is_left_from_a_kill_is_no_network(cache):
    (cache/".toy.x1"/"toy").mkdir(parents=True)
    (cache/".toy.x1"/"toy"/"toy.safetensors").touch()
    assert find_kept("toy") is None and not [r for r in catalog.list_weights() if r["here"] and "toy" in r["name"]]


def test_the_users_own_copy_has_to_be_the_same(cache, tmp_path):
    (tmp_path/"net.onnx").write_bytes(b"net")
    with pytest.raises(UserError, match="--allow-licences research"): add_weights("face", tmp_path/"net.onnx")
    assert add_weights("face", tmp_path/"net.onnx", ("research",)) == weights_path("face")
    (tmp_path/"net.onnx").write_bytes(b"another")
    with pytest.raises(UserError, match="under a name of your own"): add_weights("face", tmp_path/"net.onnx", ("research",))
    assert add_weights("mine", tmp_path/"net.onnx").read_bytes() == b"another"


@pytest.fixture
def telephone(cache, tmp_path, monkeypatch):
    "A wheel with two .tflite networks (a reshape each), and its entry: the bytes are those of the lesson of nets/8_tflite."
    cell = next(c.source for c in code_cells(ROOT/"nbs/nets/8_tflite.ipynb") if "def make_flat(" in c.source)
    scope = {**vars(tflite), "test_eq": lambda a, b: None}
    exec(cell, scope)
    def network(size):
        text = lambda name: np.frombuffer(name.encode(), np.uint8)
        tensors = [{0: np.int32([1, size]), 3: text("x")}, {0: np.int32([3]), 1: 2, 2: 1, 3: text("shape")}, {0: np.int32([1, size, 1]), 3: text("y")}]
        buffers = [{}, {0: np.int32([1, size, 1]).view(np.uint8)}]
        op = {1: np.int32([0, 1]), 2: np.int32([2])}
        return scope["make_flat"]({1: [{0: 22}], 4: buffers, 2: [{0: tensors, 1: np.int32([0]), 2: np.int32([2]), 3: [op]}]})
    files = {"far/a.tflite": network(3), "far/b.tflite": network(4)}
    monkeypatch.setitem(CATALOG, "far", WeightsEntry("far", "tests", "pip:far==1.0", {n: sha(d) for n, d in files.items()}, "MIT", "us", 0, notices=("far/LICENSE",)))
    (tmp_path/"wheels").mkdir()
    about = {"far/LICENSE": "far", "far-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: far\nVersion: 1.0\n",
             "far-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp312-cp312-manylinux_2_28_x86_64\n", "far-1.0.dist-info/RECORD": ""}
    wheel = tmp_path/"wheels"/"far-1.0-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        for name, data in (files | about).items(): z.writestr(name, data)
    return wheel, files


KEPT = ["LICENCE-0.txt", "far.a.safetensors", "far.a.tflite", "far.b.safetensors", "far.b.tflite", "source.json"]


def test_networks_for_telephones_are_kept_in_both_forms_from_a_wheel_for_any_machine(cache, telephone):
    path, = fetch_entries(["far"])                                          # the wheel is for Python 3.12 on Linux, whoever asks
    assert path == cache/"far"/"far.a.safetensors" and sorted(f.name for f in path.parent.iterdir()) == KEPT
    assert (cache/"far"/"far.b.tflite").read_bytes() == telephone[1]["far/b.tflite"]
    assert load_graph(cache/"far"/"far.b.safetensors")(torch.arange(8.).reshape(2, 4))["y"].shape == (2, 4, 1)


def test_a_wheel_or_both_of_its_files_can_be_added(cache, telephone, tmp_path):
    wheel, files = telephone
    assert sorted(f.name for f in add_weights("far", wheel).parent.iterdir()) == KEPT
    for name, data in files.items(): (tmp_path/name.split("/")[1]).write_bytes(data)
    assert sorted(f.name for f in add_weights("far", tmp_path/"b.tflite").parent.iterdir()) == KEPT[1:]
    (tmp_path/"a.tflite").write_bytes(files["far/b.tflite"])
    with pytest.raises(UserError, match="a.tflite: not the file of far"): add_weights("far", tmp_path/"b.tflite")
    (tmp_path/"a.tflite").unlink()
    with pytest.raises(UserError, match="a.tflite: no such file; far needs it"): add_weights("far", tmp_path/"b.tflite")
    with pytest.raises(UserError, match="not the archive that was expected"): add_weights("toy", wheel)


def test_weights_are_fetched_where_there_is_no_pytorch(cache, telephone):
    code = "import sys; sys.modules['torch'] = None; from penaltyanon.nets import catalog; catalog.list_entry(catalog.WeightsEntry(*sys.argv[1:4], eval(sys.argv[4]), 'MIT', 'us', 0, notices=('far/LICENSE',))); print(catalog.add_weights('far', sys.argv[5]).name)"
    done = subprocess.run([sys.executable, "-c", code, "far", "tests", "pip:far==1.0", repr(CATALOG["far"].files), str(telephone[0])], capture_output=True, text=True)
    assert done.stdout.strip() == "far.a.safetensors", done.stderr


def test_the_commands(cache):
    listed = call("list")
    assert listed.returncode == 0 and all(name in listed.stdout for name in ("efficientnet-lite0", "faceres-deep", "kinetics400:i3d_r50", "RESEARCH ONLY", "nothing is part of the package"))
    for args, code, says in (
            (("fetch", "facers-deep"), 2, "did you mean faceres-deep?"),
            (("fetch", "gear"), 1, "say --allow-licences research"),
            (("fetch", "centerface", "--offline"), 1, "and --offline"),
            (("path", "centerface"), 1, "get it with `penaltyanon weights fetch centerface`"),
            (("add", "mine", "/nowhere/net.onnx"), 1, "/nowhere/net.onnx: no such file")):
        done = call(*args)
        assert done.returncode == code and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_list_is_whole():
    "Every entry says what must be known, and no entry can be mistaken for another."
    for e in CATALOG.values():
        index, _, spec = e.package.partition(":")
        assert index in ("pip", "npm") and ("==" if index == "pip" else "@") in spec, e.name
        assert e.files and all(len(s) == 64 for s in e.files.values()) and e.notices and e.licence and e.origin, e.name
    assert all(e.terms == "research" for e in CATALOG.values() if "embedding" in e.purpose), "face networks were trained on photographs for research"
    page = (ROOT/"docs/weights.md").read_text(encoding="utf-8")
    for e in CATALOG.values(): assert f"| `{e.name}` |" in page and e.package.partition(":")[2] in page, e.name


def test_efficientnet_takes_the_names_of_its_package(cache, tmp_path):
    "A file with the package's names in the package's order fills our network, the last layer included."
    state = {f"_t{i}": v for i, v in enumerate(build_model("efficientnet_lite0", 1000, PRIVACY_MODELS).trunk.state_dict().values())}
    state |= {"_fc.weight": torch.ones(1000, 1280), "_fc.bias": torch.arange(1000.0)}
    torch.save(state, tmp_path/"e.pth")
    (cache/"efficientnet-lite0").mkdir(parents=True)
    catalog.convert_weights(tmp_path/"e.pth", cache/"efficientnet-lite0"/"efficientnet-lite0", "tf_efficientnet_lite0")
    net = build_model("efficientnet_lite0", 1000, PRIVACY_MODELS, "imagenet")
    assert torch.equal(net.head.bias, torch.arange(1000.0)) and torch.equal(net.trunk.conv_stem.weight, state["_t0"])
    assert build_model("efficientnet_lite0", 3, PRIVACY_MODELS, "imagenet").head.out_features == 3


def test_values_are_freed_after_their_last_reader():
    "A chain of a hundred nodes never holds more than two of its pictures."
    nodes = [dict(name="x", op="Placeholder", inputs=[], attrs={})]
    nodes += [dict(name=f"n{i}", op="Relu", inputs=[(nodes[-1]["name"] if i == 0 else f"n{i - 1}", 0)], attrs={}) for i in range(100)]
    net = TfjsNetwork(dict(nodes=nodes, input=dict(name="x", shape=[-1, 2, 2, 1], type="DT_FLOAT"), outputs=dict(y=("n99", 0))), {})
    held, compute = [], net.compute
    def counted(node, values):
        held.append(len(values))
        return compute(node, values)
    net.compute = counted
    assert net(torch.ones(1, 2, 2, 1))["y"].sum() == 4 and max(held) == 1


# ---- the mini sets
@pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason="no ../shared/data/ucf101-mini here")
def test_the_mini_ucf101_is_made_again(tmp_path):
    "From an archive with the same clips: the very set, lists included, as the loader reads it."
    made = make_mini_set("ucf101", SHARED/"ucf101-mini", tmp_path/"out")
    for part in ("UCF-101", "ucfTrainTestlist"):
        for f in (SHARED/"ucf101-mini"/part).rglob("*.*"): assert (made/f.relative_to(SHARED/"ucf101-mini")).read_bytes() == f.read_bytes()
    assert len(list(made.rglob("*.avi"))) == 298 == len(read_mini_list("ucf101"))
    ours, theirs = (open_data(f"ucf101:{root}", 1, None) for root in (made, SHARED/"ucf101-mini"))
    assert (len(ours.train), len(ours.test)) == (len(theirs.train), len(theirs.test)) == (210, 88)


@pytest.mark.skipif(not (SHARED/"fairface-mini").is_dir(), reason="no ../shared/data/fairface-mini here")
def test_a_missing_and_a_changed_photograph_are_said(tmp_path):
    root = tmp_path/"fairface"
    for name in list(read_mini_list("fairface"))[:3]:
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHARED/"fairface-mini"/name, root/name)
    (root/name).write_bytes(b"another photograph")
    with pytest.raises(UserError, match=f"of 2799 files 2796 missing, first .*; 1 different, first {name}"): make_mini_set("fairface", root, tmp_path/"out")
    assert not list((tmp_path/"out").iterdir())


def test_the_command_for_mini_sets(tmp_path):
    done = subprocess.run([sys.executable, "-m", "penaltyanon.cli", "data", "mini", tmp_path/"out", "--ucf101", tmp_path/"none"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == f"error: {tmp_path}/none: no such folder" and not (tmp_path/"out").exists()
    done = subprocess.run([sys.executable, "-m", "penaltyanon.cli", "data", "mini", tmp_path/"out"], capture_output=True, text=True)
    assert done.returncode == 2 and "name at least one archive" in done.stderr
