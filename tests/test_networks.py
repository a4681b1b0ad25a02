"Anonymizers and recognizers: shapes, golden numbers, gradients, weights, disk, and the published mistakes."
import hashlib, json, math, re
from urllib.error import URLError
import numpy as np
import pytest, timm, torch, torchvision
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from conftest import ROOT, SHARED
from penaltyanon.nets.anonymizers import (ARCHITECTURES, Identity, UNet, UNetPP, anonymize_clip, freeze_batchnorm,
                                          load_anonymizer, save_anonymizer)
from penaltyanon.nets.clipnets import I3D
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.nets.stprivacy import STPRIVACY_SIZES, TokenAnonymizer
from penaltyanon.nets.student import TinyNet
from penaltyanon.nets.recognizers import ACTION_MODELS, HUB, PRIVACY_MODELS, Projector, build_model, weights_file
from penaltyanon.core.files import file_hash
from penaltyanon.nets.weights import load_trunk, match_tensors


@pytest.fixture(scope="module")
def f_A():
    torch.manual_seed(0)
    return freeze_batchnorm(UNetPP(decoder=(16, 8, 8, 8))).eval()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3))
def test_any_frame_size_comes_back_in_range(f_A, h, w, n):
    with torch.no_grad(): y = f_A(torch.rand(n, 3, h, w))
    assert y.shape == (n, 3, h, w) and y.dtype == torch.float32
    assert y.min() >= 0 and y.max() <= 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5))
def test_a_clip_is_its_frames(f_A, n, t):
    clip = torch.rand(n, 3, t, 16, 24)
    with torch.no_grad():
        whole = anonymize_clip(f_A, clip)
        for i in range(t): assert torch.allclose(whole[:, :, i], f_A(clip[:, :, i]), atol=1e-5)


def test_a_saved_anonymizer_is_the_same_function(f_A, tmp_path):
    path, x = save_anonymizer(tmp_path/"a.safetensors", f_A, {"B": 0.5}), torch.rand(2, 3, 30, 30)
    again, card = load_anonymizer(path)
    with torch.no_grad(): assert torch.equal(again(x), f_A(x)) and torch.equal(again.train()(x), f_A(x))
    assert card["B"] == 0.5 == json.loads((tmp_path/"a.json").read_text())["B"]


@pytest.mark.parametrize("content", ["empty", "text", "half", "pickle", "foreign"])
def test_a_bad_anonymizer_file_is_one_line(f_A, tmp_path, content):
    path = save_anonymizer(tmp_path/"a.safetensors", f_A, {})
    whole = path.read_bytes()
    if content == "pickle": torch.save(f_A.state_dict(), path)
    elif content == "foreign": save_file({"w": torch.ones(2)}, path)
    else: path.write_bytes({"empty": b"", "text": b"hello" * 20, "half": whole[:len(whole) // 2]}[content])
    with pytest.raises(UserError, match="a.safetensors") as e: load_anonymizer(path)
    assert "\n" not in str(e.value)


# ---- every network: the literature's size, golden numbers, gradients, a step, disk, odd sizes
NETWORKS = {**{("clips", n): b for n, b in ACTION_MODELS.items()}, **{("frames", n): b for n, b in PRIVACY_MODELS.items()},
            ("anonymizer", "UNetPP"): lambda k: UNetPP(decoder=(32, 16, 8, 8)), ("anonymizer", "UNet"): lambda k: UNet(decoder=(32, 16, 8, 8))}
GOLDEN = ROOT/"tests/golden/networks.json"
# MViT's class token never passes the last block's pooled queries: torchvision's network has these four without a use
UNUSED = {"mvit_v2_s": [f"trunk.blocks.15.attn.{n}" for n in ("pool_q.pool.weight", "rel_pos_h", "rel_pos_t", "rel_pos_w")]}
INPUT = {"clips": (2, 3, 4, 32, 32), "frames": (2, 3, 64, 64), "anonymizer": (2, 3, 32, 32)}
ids = lambda key: "-".join(key)


def exact(shape, generator):
    "Multiples of 1/512 from -1 to 1: the same bits on every machine, which torch's normal distribution does not promise."
    return torch.randint(-512, 513, shape, generator=generator) / 512


def seeded(key):
    """A network in float64 whose every layer matters: norms are not at 1 and 0, running statistics are those of the input.
    A norm over the few positions of a last layer multiplies rounding errors by 10^4 and more: in float32 two kinds of CPU differ by 1 %."""
    g = torch.Generator().manual_seed(0)
    net = NETWORKS[key](5).double()
    for name, p in net.named_parameters():
        noise = exact(p.shape, g).double()
        p.data = noise * 2.0**-round(math.log2(p[0].numel()) / 2 - 1) if p.ndim > 1 else 1 + noise/2 if name.endswith("weight") else noise/8
    for m in net.eval().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.train(); m.momentum = 1.0
    x = (1 + exact(INPUT[key[0]], g)).double() / 2
    with torch.no_grad(): net(x)
    return net.eval(), x


def golden(key):
    "What is compared: some outputs, and a digest of the tensors' names and shapes (files of weights depend on them)."
    net, x = seeded(key)
    with torch.no_grad(): y = net(x)
    layout = repr([(k, tuple(v.shape)) for k, v in net.state_dict().items()])
    return net, x, y, dict(outputs=[float(f"{v:.9g}") for v in y.flatten()[::max(1, y.numel() // 10)]], layout=hashlib.sha256(layout.encode()).hexdigest()[:16])


@pytest.mark.parametrize("key", NETWORKS, ids=ids)
def test_network(key, tmp_path):
    kind, name = key
    net, x, y, now = golden(key)
    want = json.loads(GOLDEN.read_text())[ids(key)]
    assert now["layout"] == want["layout"], "names or shapes of tensors changed: old weight files would not load"
    assert np.allclose(now["outputs"], want["outputs"], rtol=0, atol=1e-7 * np.abs(want["outputs"]).max())
    net, x = net.float(), x.float()              # the rest as it is used
    with torch.no_grad(): y = net(x)
    assert (y[0] - y[1]).abs().max() > 1e-3 * y.abs().max(), "the golden numbers depend on the input"
    # disk: the same function comes back, into a network of zeros
    if kind != "anonymizer":
        assert y.shape == (2, 5)
        with torch.no_grad(): assert torch.allclose(net.head(net.features(x)), y, rtol=1e-4) and net.features(x).shape == (2, net.dim)
        save_file(net.state_dict(), tmp_path/"w.safetensors")
        with torch.no_grad():
            for p in net.parameters(): p.zero_()
            assert load_trunk(net, tmp_path/"w.safetensors") == [] and torch.equal(net(x), y)
        (tmp_path/"w.safetensors").unlink()
    # a training step (dropout and dropped blocks off): every parameter gets a gradient, and following it helps
    for m in net.modules():
        if isinstance(m, nn.Dropout | torchvision.ops.StochasticDepth): m.p = 0.0
    loss = net.train()(x).square().mean()
    loss.backward()
    assert sorted(k for k, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0) == UNUSED.get(name, [])
    steepness = sum(p.grad.square().sum() for p in net.parameters())
    torch.optim.SGD(net.parameters(), lr=float(0.02 * loss / steepness)).step()
    with torch.no_grad(): assert net(x).square().mean() < loss, "a step that should gain 2 %"
    # batch of one, and other sizes
    net.zero_grad(set_to_none=True)
    one = {"clips": [(4, 48, 48), (6, 48, 40), (8, 96, 96)], "frames": [(48, 48), (33, 50)], "anonymizer": [(48, 48), (33, 50)]}[kind]
    with torch.no_grad():
        for size in one: assert net.eval()(torch.rand(1, 3, *size)).shape[0] == 1
        assert net.train()(torch.rand(1, 3, *one[0])).isfinite().all(), "a batch of one trains (the published I3D squeezed it away)"


@pytest.mark.parametrize("build,layout", [(lambda: TokenAnonymizer(4, 24, **STPRIVACY_SIZES["small"]), "d45799956bae7637"), (TinyNet, "7e74fa294346b22c")], ids=["tokens", "student"])
def test_names_and_shapes_of_saved_weights_stay(build, layout):
    named = repr([(k, tuple(v.shape)) for k, v in build().state_dict().items()])
    assert hashlib.sha256(named.encode()).hexdigest()[:16] == layout, "old weight files would not load"


def test_a_card_of_the_token_anonymizer_rebuilds_it():
    "The arguments as every file since the first one holds them: flat, lists instead of tuples."
    config = dict(frames=4, size=24, dim=48, depth=2, heads=4, tubelet=[2, 8, 8], prune=[1], keep=0.5)
    net = TokenAnonymizer(**config)
    assert json.loads(json.dumps(net.config)) == config and list(net.config) == list(config)


PUBLISHED = {"r3d18": 33371472, "r2plus1d18": 31505325, "mvit_v2_s": 34537744, "resnet18": 11689512, "resnet34": 21797672, "resnet50": 25557032,
             "resnet101": 44549160, "resnet152": 60192808, "mobilenet_v2": 3504872, "efficientnet_lite0": 4652008}      # torchvision's `num_params`
ROUNDED = {"i3d_r50": (400, 28.04), "i3d": (400, 12.70), "c3d": (101, 78.41)}            # millions: pytorchvideo's model zoo, the papers' layers


def parameters(name, outputs):
    with torch.device("meta"): return sum(p.numel() for p in {**ACTION_MODELS, **PRIVACY_MODELS}[name](outputs).parameters())


def test_parameter_counts():
    for name, n in PUBLISHED.items(): assert parameters(name, 400 if name in ACTION_MODELS else 1000) == n, name
    for name, (k, m) in ROUNDED.items(): assert parameters(name, k) / 1e6 == pytest.approx(m, abs=0.005), name
    assert {*PUBLISHED, *ROUNDED, "r3d_small", "r2d_small"} == {*ACTION_MODELS, *PRIVACY_MODELS}
    for net, m in ((UNetPP(), 5.51), (UNet(), 17.26)): assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(m, abs=0.005)


def test_a_clip_network_is_a_video_level_attacker():
    net = build_model("i3d", 3, ACTION_MODELS)
    loss = F.binary_cross_entropy_with_logits(net(torch.rand(2, 3, 4, 32, 32)), torch.tensor([[1., 0, 1], [0, 0, 1]]))
    loss.backward()
    assert net.head.weight.grad.abs().sum() > 0
    assert PRIVACY_MODELS["r3d18"](3).eval()(torch.rand(2, 3, 32, 32)).shape == (2, 3), "R3D-18 sees a frame as a clip of one (Table 7)"


@pytest.mark.parametrize("name", [n for n in PRIVACY_MODELS if n not in ("resnet101", "resnet152")])
def test_the_projector_stands_on_any_privacy_network(name):
    p = Projector(build_model(name, 1, PRIVACY_MODELS))
    z = p(torch.rand(3, 3, 64, 48))
    assert z.shape == (3, 128) and torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5)
    z[:, 0].sum().backward()
    assert all(q.grad is not None for q in p.parameters())


def test_too_short_or_the_wrong_kind_is_one_line():
    with pytest.raises(UsageError, match="frames: this network needs at least 2, got 1"): build_model("i3d_r50", 3, ACTION_MODELS)(torch.rand(2, 3, 1, 32, 32))
    with pytest.raises(UsageError, match="ResNet sees frames"): build_model("resnet18", 3, PRIVACY_MODELS)(torch.rand(2, 3, 4, 32, 32))
    with pytest.raises(UsageError, match="I3D sees clips"): build_model("i3d", 3, ACTION_MODELS)(torch.rand(3, 32, 32))


# ---- pretrained weights
def library_state(name):
    "Names and shapes of what the library publishes for a network, without a single number."
    with torch.device("meta"):
        if name == "i3d_r50":
            from pytorchvideo.models.hub import i3d_r50
            return i3d_r50().state_dict()
        if name == "i3d": return {**I3D().state_dict(), "logits.conv3d.weight": torch.empty(400, 1024, 1, 1, 1), "logits.conv3d.bias": torch.empty(400)}
        if name == "mvit_v2_s": return torchvision.models.video.mvit_v2_s().state_dict()
        if name == "efficientnet_lite0": return timm.create_model("tf_efficientnet_lite0").state_dict()      # the names that `weights fetch` gives
        known = {"r3d18": torchvision.models.video.r3d_18, "r2plus1d18": torchvision.models.video.r2plus1d_18}
        return known.get(name, getattr(torchvision.models, name, None))().state_dict()


@pytest.mark.parametrize("kind,name", [(kind, name) for kind in HUB for name in HUB[kind]])
def test_the_librarys_names_are_understood(kind, name):
    given = library_state(name)
    with torch.device("meta"): net = (ACTION_MODELS if kind == "kinetics400" else PRIVACY_MODELS)[name](400 if kind == "kinetics400" else 1000)
    own, pairs = net.state_dict(), match_tensors(net, given)
    assert pairs.keys() == own.keys() and {k for k, _ in pairs.values()} == given.keys()
    assert all(v.shape[:own[k].ndim] == own[k].shape for k, (_, v) in pairs.items())


@pytest.mark.parametrize("kind,name", [(kind, name) for kind in ("kinetics400", "imagenet") for name, url in HUB[kind].items() if "://" in url])
def test_offline_says_what_to_place_where(kind, name, monkeypatch, tmp_path):
    def offline(*args, **kwargs): raise URLError("[Errno -3] Temporary failure in name resolution")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"w")); monkeypatch.setenv("TORCH_HOME", str(tmp_path/"t"))
    with pytest.raises(UserError) as e: weights_file(name, kind)
    monkeypatch.delenv("PENALTYANON_WEIGHTS"); monkeypatch.setenv("PENALTYANON_CACHE", str(tmp_path/"c"))
    with pytest.raises(UserError, match=f"place it as {tmp_path}/c/weights/"): weights_file(name, kind)
    url = HUB[kind][name]
    assert "\n" not in str(e.value) and url in str(e.value) and str(tmp_path/"w"/url.rsplit("/", 1)[-1]) in str(e.value)
    digits = re.search(r"-([0-9a-f]{8})\.pth", url)
    assert (f"sha256 begins with {digits.group(1)}" if digits else "no checksum published") in str(e.value)


def small_hub(monkeypatch, tmp_path, content=None):
    "A hub that publishes r2d_small with 6 outputs, its checksum in the name, from a folder."
    torch.manual_seed(3)
    net, hub = build_model("r2d_small", 6, PRIVACY_MODELS), tmp_path/"hub"
    hub.mkdir(); torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, hub/"f.pth")
    name = f"r2d-{file_hash(hub/'f.pth')[:8]}.pth"
    (hub/"f.pth").rename(hub/name)
    if content: (hub/name).write_bytes(content)
    monkeypatch.setitem(HUB["imagenet"], "r2d_small", f"file://{hub}/{name}")
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"w")); monkeypatch.setenv("TORCH_HOME", str(tmp_path/"t"))
    return net, name


def test_weights_by_name_are_fetched_once_and_loaded(monkeypatch, tmp_path, capsys):
    net, name = small_hub(monkeypatch, tmp_path)
    same = build_model("r2d_small", 6, PRIVACY_MODELS, "imagenet")
    assert torch.equal(same.head.weight, net.head.weight) and (tmp_path/"w"/name).is_file()
    (tmp_path/"hub"/name).unlink()                                      # from now on there is no network
    other = build_model("r2d_small", 2, PRIVACY_MODELS, "imagenet")
    assert torch.equal(other.stages[0][0].weight, net.stages[0][0].weight) and other.head.weight.shape[0] == 2
    assert "fresh: head.bias, head.weight" in capsys.readouterr().out


def test_a_wrong_checksum_is_refused(monkeypatch, tmp_path):
    _, name = small_hub(monkeypatch, tmp_path, b"something else")
    with pytest.raises(UserError, match="invalid hash value"): build_model("r2d_small", 6, PRIVACY_MODELS, "imagenet")
    (tmp_path/"w").mkdir(exist_ok=True); (tmp_path/"w"/name).write_bytes(b"placed by hand, but damaged")
    with pytest.raises(UserError, match="delete the file"): build_model("r2d_small", 6, PRIVACY_MODELS, "imagenet")


def test_weights_that_no_one_publishes(monkeypatch, tmp_path):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path)); monkeypatch.setenv("TORCH_HOME", str(tmp_path/"t"))
    with pytest.raises(UsageError, match="published for 'c3d'"): build_model("c3d", 3, ACTION_MODELS, "kinetics400")
    with pytest.raises(UsageError, match="published for 'r2d_small'"): build_model("r2d_small", 3, PRIVACY_MODELS, "simclr")
    with pytest.raises(UserError, match="place VISSL's SimCLR"): build_model("resnet50", 3, PRIVACY_MODELS, "simclr")
    with pytest.raises(UserError, match="imagnet: no such weights file"): build_model("r2d_small", 3, PRIVACY_MODELS, "imagnet")


@pytest.mark.parametrize("prefix", ["", "module.encoder_q.", "backbone.", "_feature_blocks."])
def test_self_supervised_files_fill_the_trunk(monkeypatch, tmp_path, prefix):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path))
    source = torchvision.models.resnet18()
    state = {prefix + k: v for k, v in source.state_dict().items() if not k.startswith("fc.")}
    torch.save({"epoch": 3, "state_dict": {**state, "projection.0.weight": torch.ones(3)}}, tmp_path/"simclr_resnet18.pth")
    monkeypatch.setitem(HUB["simclr"], "resnet18", "simclr_resnet18")
    net = build_model("resnet18", 3, PRIVACY_MODELS, "simclr")
    assert torch.equal(net.trunk.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


# ---- anonymizers by architecture
def test_an_old_file_still_loads(f_A, tmp_path):
    "Files of the first release: architecture UNetPP, the decoder as a list."
    card = {"architecture": "UNetPP", "config": {"decoder": [16, 8, 8, 8]}, "B": 0.3}
    save_file({k: v.contiguous() for k, v in f_A.state_dict().items()}, tmp_path/"old.safetensors", metadata={"card": json.dumps(card)})
    again, read = load_anonymizer(tmp_path/"old.safetensors")
    x = torch.rand(1, 3, 20, 20)
    with torch.no_grad(): assert torch.equal(again(x), f_A(x)) and read == card


def test_every_architecture_survives_the_disk(tmp_path):
    for f_A in (UNet(decoder=(16, 8, 8, 8)), UNetPP(decoder=(16, 8, 8, 8)), Identity()):
        x, f_A = torch.rand(2, 3, 21, 34), freeze_batchnorm(f_A).eval()
        again, card = load_anonymizer(save_anonymizer(tmp_path/"a.safetensors", f_A, {}))
        assert type(again) is type(f_A) is ARCHITECTURES[card["architecture"]]
        with torch.no_grad(): assert torch.equal(again(x), f_A(x))


def test_a_higher_floor_may_add_an_architecture(monkeypatch, tmp_path):
    class Dim(Identity):
        config = {}
        def forward(self, x): return super().forward(x) / 2
    path = save_anonymizer(tmp_path/"a.safetensors", Dim(), {})
    with pytest.raises(UserError, match="architecture 'Dim'"): load_anonymizer(path)
    monkeypatch.setitem(ARCHITECTURES, "Dim", Dim)
    assert load_anonymizer(path)[0](torch.ones(1, 3, 2, 2)).max() == 0.5


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50))
def test_the_unet_keeps_the_contract_at_any_size(h, w):
    torch.manual_seed(0)
    with torch.no_grad(): y = UNet(decoder=(16, 8, 8, 8)).eval()(torch.rand(1, 3, h, w))
    assert y.shape == (1, 3, h, w) and y.min() >= 0 and y.max() <= 1


def test_normalization_is_inside():
    "A grey picture of the ImageNet mean must reach the first layer as zeros."
    net, seen = build_model("r2d_small", 2, PRIVACY_MODELS).eval(), []
    net.stages[0].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert seen[0].abs().max() < 1e-5


def test_the_identity_is_exact():
    x = torch.rand(2, 3, 7, 9)
    assert torch.equal(Identity()(x), x)


@pytest.mark.skipif(not (SHARED/"weights").is_dir(), reason="no ../shared/data/weights here")
def test_bring_your_own_movinet(monkeypatch):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(SHARED/"weights"))
    net = build_model(f"{ROOT}/examples/pretrained.py:movinet_a0", 10, ACTION_MODELS).eval()
    clip = torch.rand(2, 3, 4, 64, 64, requires_grad=True)
    out = net(clip)
    out.sum().backward()
    assert out.shape == (2, 10) and clip.grad.abs().sum() > 0, "f_A needs a gradient through it"


def test_bring_your_own_without_weights_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="set PENALTYANON_WEIGHTS"): build_model(f"{ROOT}/examples/pretrained.py:movinet_a0", 10, ACTION_MODELS)


if __name__ == "__main__":      # python tests/test_networks.py writes the golden numbers anew
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(f'{json.dumps(ids(k))}: {json.dumps(golden(k)[3])}' for k in NETWORKS) + "\n}\n")
