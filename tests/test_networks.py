"Anonymizers and recognizers: shapes, gradients, disk, and the published mistakes."
import json
import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from conftest import ROOT, SHARED
from penaltyanon.anonymizers import Identity, UNetPP, anonymize_clip, freeze_batchnorm, load_anonymizer, save_anonymizer
from penaltyanon.core import UserError
from penaltyanon.recognizers import ACTION_MODELS, PRIVACY_MODELS, Projector, build_model


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


def test_every_parameter_gets_a_gradient():
    net = UNetPP(decoder=(16, 8, 8, 8))
    net(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert not [k for k, p in net.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]


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


@pytest.mark.parametrize("name", ACTION_MODELS)
def test_action_models(name):
    torch.manual_seed(0)
    net = build_model(name, 7, ACTION_MODELS).eval()
    with torch.no_grad():
        for t, size in ((4, 48), (8, 64)): assert net(torch.rand(2, 3, t, size, size)).shape == (2, 7)
        assert net(torch.rand(1, 3, 4, 48, 48)).shape == (1, 7), "a batch of one (the published I3D squeezed it away)"


@pytest.mark.parametrize("name", PRIVACY_MODELS)
def test_privacy_models(name):
    torch.manual_seed(0)
    net = build_model(name, 5, PRIVACY_MODELS).eval()
    x = torch.rand(3, 3, 64, 48)
    with torch.no_grad():
        assert net(x).shape == (3, 5) and net.features(x).shape == (3, net.dim)
        z = Projector(net)(x)
    assert z.shape == (3, 128) and torch.allclose(z.norm(dim=1), torch.ones(3), atol=1e-5)


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
