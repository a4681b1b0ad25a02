"Five methods in one loop: each without what makes it special is SPAct, each lowers its own loss, and none forgets its state."
import itertools, math
from dataclasses import replace
import pytest, torch
from penaltyanon.train import batches, minimax, start
from penaltyanon.train import methods
from penaltyanon.nets.anonymizers import UNet, anonymize_clip, freeze_batchnorm, save_anonymizer
from penaltyanon.core.checkpoints import RunContext
from penaltyanon.core.files import UsageError
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.settings import CHOICES, TRAINED_METHODS, resolve, run_name, settings_dict, start_key
from penaltyanon.train.methods import METHODS, make_anonymizer, trained_anonymizer
from penaltyanon.nets.obfuscation import OBFUSCATIONS
from penaltyanon.nets.stprivacy import STPRIVACY_SIZES, TokenAnonymizer

CPU = torch.device("cpu")


class Data:
    "A stripe whose speed is the action, images whose colour is private; some labels unknown"
    def __init__(self, views=1): self.views = views
    def __len__(self): return 12
    def set_epoch(self, e): pass
    def clip(self, i, start):
        x = torch.full((3, 4, 32, 32), 0.3)
        for t in range(4): x[:, t, :, (start + (1 + i % 3) * 3 * t) % 28:][:, :, :4] = 0.9
        return x
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        clips = torch.stack([self.clip(i, i), self.clip(i, i), self.clip(i, i + 9)][:self.views])
        image = 0.3 * torch.rand(2, 3, 32, 32, generator=g) + 0.6 * torch.tensor([i % 2, 0.5, 1 - i % 2]).view(3, 1, 1)
        return dict(clip=clips[0] if self.views == 1 else clips, action=i % 3, frame=image, attributes=torch.tensor([float(i % 2), math.nan if i < 6 else i % 3 == 0]))


def settings(name, **changes):
    return resolve("smoke", method=name, **{**dict(steps=4, backbone="unet", decoder=(16,), lr_anonymizer=1e-3), **changes})


def anonymizer(s):
    "f_A, untrained; of a U-Net's picture half is the input's, or f_B would see the same grey everywhere"
    return make_anonymizer(s) if s.backbone == "tokens" else freeze_batchnorm(UNet(s.decoder, 0.5))


def networks(s, method=None, seed=0):
    seed_everything(seed)
    return minimax.make_networks(s, anonymizer(s), 3, CPU, attributes=2, method=method or METHODS[s.method])


def streams(s): return batches.EndlessBatches(Data(3 if s.method == "tedspad" and s.triplet else 1), 4, 0), batches.EndlessBatches(Data(), 4, 0)


def train(name, method=None, **changes):
    s, rows = settings(name, **changes), []
    method = method or METHODS[name]
    p = networks(s, method)
    minimax.minimax(p, *streams(s), RunContext(s, CPU, rows.append, progress=False), method)
    return p, rows


def quiet(s): return RunContext(s, CPU, progress=False)


def weights(net): return torch.cat([v.flatten().double() for v in net.state_dict().values()])


@pytest.fixture(scope="module")
def spact(): return weights(train("spact")[0].f_A)


def without_labels(): return replace(METHODS["vita"], **{k: getattr(METHODS["spact"], k) for k in ("privacy_loss", "adversarial_loss", "make_f_B")})


def test_the_penalty_method_without_penalty_is_spact(spact):
    assert torch.equal(weights(train("penalty", penalty="none")[0].f_A), spact)
    assert torch.equal(weights(train("penalty", penalty="hinge", lam=0.0)[0].f_A), spact)
    assert not torch.equal(weights(train("penalty", penalty="hinge", B=0.0, lam=9.0)[0].f_A), spact)


def test_vita_with_one_network_no_restart_and_the_self_supervised_loss_is_spact(spact):
    assert torch.equal(weights(train("vita", without_labels(), ensemble=1, restart_every=0)[0].f_A), spact)
    assert not torch.equal(weights(train("vita", ensemble=1, restart_every=0)[0].f_A), spact)


def test_tedspad_with_weight_0_is_spact(spact):
    assert torch.equal(weights(train("tedspad", triplet=0.0, weight_action=1.0)[0].f_A), spact)
    assert not torch.equal(weights(train("tedspad", weight_action=1.0)[0].f_A), spact)


def test_stprivacy_with_keep_rate_1_only_reconstructs():
    p, rows = train("stprivacy", keep_rate=1.0)
    clip = torch.rand(2, 3, 4, 32, 32)
    with torch.no_grad():
        x, keep, _ = p.f_A.eval().encode(clip)
        assert keep.all() and (p.f_A.anonymize_clip(clip) > 0).all()
        assert torch.equal(p.f_A.anonymize_clip(clip), p.f_A.train().anonymize_clip(clip))
    assert [r["grad_privacy"] > 0 for r in rows] == [False, False, True, True], "the attack begins with phase 2"


def test_unknown_labels_and_the_all_ones_target():
    "An image without labels changes no gradient; answering all ones is not what f_A is asked for."
    z, y = torch.randn(4, 2, requires_grad=True), torch.tensor([[math.nan, math.nan], [1.0, math.nan]])
    methods.attribute_loss_of_views(z, y).backward()
    assert not z.grad[0].any() and not z.grad[2].any() and z.grad[1, 0] != 0 and z.grad[1, 1] == 0
    ones, halves = torch.full((1, 4, 2), 9.0), torch.zeros(1, 4, 2)
    assert methods.fool_most_confident(None, ones, None) > methods.fool_most_confident(None, halves, None)
    two = torch.cat([ones, halves]).requires_grad_()
    methods.fool_most_confident(None, two, None).backward()
    assert two.grad[0].abs().min() > 0 and not two.grad[1].any(), "only the surest network is attacked"


def test_the_strongest_of_an_ensemble_is_attacked():
    losses = torch.tensor([2.0, 0.5, 1.0], requires_grad=True)
    minimax.fool_strongest(None, None, losses).backward()
    assert losses.grad.tolist() == [0, -1, 0]


@pytest.mark.parametrize("name", TRAINED_METHODS)
def test_twenty_steps_lower_the_loss(name):
    "On one fixed batch with the recognizers held, f_A's objective falls; with f_A held, theirs fall."
    s = settings(name, steps=40, penalty="hinge", restart_every=0)
    p, method = networks(s), METHODS[name]
    b = batches.next_batch(*streams(s), CPU)
    method.before_step(p, 40, None, s, method)
    start.warm_up(p, itertools.repeat(dict(clip=next(streams(s)[0])["clip"], action=b.action)), streams(s)[1], quiet(replace(s, warmup_steps=5)), method)
    seed_everything(0)
    own = [minimax.anonymizer_step(p, b, s, method)[0]["objective"] for _ in range(20)]
    assert sum(own[-3:]) / 3 < sum(own[:3]) / 3, own
    x, v = minimax.anonymize_both(p.f_A, b, s)
    theirs = [minimax.recognizers_step(p, x, v, b, s, method) for _ in range(20)]
    for k in ("loss_action_step2", "loss_privacy_step2"): assert theirs[-1][k] < theirs[0][k]


@pytest.mark.parametrize("name", ["vita", "tedspad", "stprivacy"])     # the penalty method: tests/test_training.py
def test_a_training_survives_a_resume(name):
    "Stopped after a restart or in the second phase, and taken up by other networks: ensembles, copies to restart from, phases."
    s = settings(name, steps=6, **(dict(ensemble=2, restart_every=2) if name == "vita" else {}))
    method, data = METHODS[name], streams(s)
    p = networks(s)
    minimax.minimax(p, *data, quiet(s), method, steps=6 if name == "stprivacy" else 3)
    saved = minimax.training_state(p)
    clips, images = streams(s)
    b = [(next(clips), next(images)) for _ in range(4)]
    seed_everything(1); q = minimax.resume_training(networks(s, seed=9), saved)
    for nets in (p, q):
        seed_everything(2)
        s2 = replace(s, steps=8)
        minimax.minimax(nets, iter([x for x, _ in b]), itertools.cycle(y for _, y in b), quiet(s2), method, steps=5 if name != "stprivacy" else 8)
    for net in ("f_A", "f_T", "f_B"): assert torch.equal(weights(getattr(p, net)), weights(getattr(q, net))), net
    assert len(minimax.networks_of(q.f_B)) == s.ensemble and q.step == p.step


def test_a_restart_goes_back_and_catches_up():
    s = settings("vita", ensemble=2, restart_every=3)
    p, updates = networks(s), []
    p.step, images = 3, itertools.cycle([next(streams(s)[1])])
    before = weights(p.f_B)
    METHODS["vita"].before_step(p, 9, images, replace(s, restart_every=0), METHODS["vita"])
    assert torch.equal(weights(p.f_B), before)
    with torch.no_grad(): [q.add_(1.0) for q in p.f_B.parameters()]
    counted = (updates.append(1) or x for x in images)
    METHODS["vita"].before_step(p, 9, counted, s, METHODS["vita"])
    assert len(updates) == 3 and (weights(p.f_B) - before).abs().mean() < 0.1


def test_the_keep_rate_converges_to_its_target():
    "Beside the other losses, not alone: the drawn shares stay near k, k^2, k^3."
    s = settings("stprivacy", steps=120, keep_rate=0.6, lr_anonymizer=2e-3)
    p, b, shares = networks(s), batches.next_batch(*streams(s), CPU), []
    METHODS["stprivacy"].before_step(p, 240, None, s, METHODS["stprivacy"])
    for _ in range(60):
        p.f_A.train().requires_grad_(True)
        x = anonymize_clip(p.f_A, b.clip)
        shares.append([m.mean().item() for m, _ in p.f_A.masks])
        methods.tokens_loss(p.f_A, x, b).backward()
        minimax.clip_and_step(p.f_A, p.opt_A, replace(s, clip_grad=0.0))
    late = torch.tensor(shares[-15:]).mean(0)
    assert (late - torch.tensor([0.6, 0.36, 0.216])).abs().max() < 0.08, late
    with torch.no_grad(): kept = p.f_A.eval().encode(b.clip)[1]
    assert (kept.sum(-1) == int(16 * 0.216)).all(), "and evaluation keeps exactly its share of each moment"


def test_dropped_tokens_are_black_and_say_nothing():
    net = freeze_batchnorm(TokenAnonymizer(frames=4, size=32, keep=0.5, **STPRIVACY_SIZES["small"])).eval()
    clip = torch.rand(1, 3, 4, 32, 32)
    with torch.no_grad(): out = net.anonymize_clip(clip)
    assert (out == 0).float().mean() > 0.8


def test_the_published_size():
    with torch.device("meta"): net = make_anonymizer(resolve("paper", method="stprivacy", size=112))
    assert math.prod(net.position.shape[2:]) == 392 and len(net.blocks) == 12 and 85e6 < sum(p.numel() for p in net.parameters()) < 95e6


@pytest.mark.parametrize("name", TRAINED_METHODS)
def test_a_trained_method_is_opened_like_any_other(name, tmp_path):
    s = settings(name)
    f_A = freeze_batchnorm(make_anonymizer(s)).eval()
    if name == "stprivacy": f_A.keep = s.keep_rate
    back, card = trained_anonymizer(save_anonymizer(tmp_path/"anonymizer.safetensors", f_A, dict(settings=settings_dict(s))))
    clip = torch.rand(1, 3, 5, 20, 36)
    with torch.no_grad(): assert torch.allclose(anonymize_clip(back, clip), anonymize_clip(f_A, clip), atol=1e-6)
    assert card["settings"]["method"] == name


def test_every_choice_of_method_can_be_opened_or_trained():
    assert set(CHOICES["method"]) == set(METHODS) | set(OBFUSCATIONS) | {"oracle", "file"} and tuple(METHODS) == TRAINED_METHODS
    for name in {*OBFUSCATIONS, "oracle"}: assert trained_anonymizer(name)[0](torch.rand(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(UsageError, match="is trained first"): trained_anonymizer("tedspad")


def test_one_cell_of_the_grid_each():
    "Every method on the paper's backbone and on its own: names differ, and only shared starts are shared."
    cells = {name: resolve("demo", method=name, backbone="unetpp") for name in TRAINED_METHODS}
    assert len({run_name(s) for s in cells.values()}) == 5
    assert start_key(cells["spact"]) == start_key(cells["penalty"]) and len({start_key(s) for s in cells.values()}) == 4
    assert {m: resolve("demo", method=m).backbone for m in TRAINED_METHODS} == dict(penalty="unetpp", spact="unet", vita="unet", tedspad="unetpp", stprivacy="tokens")
    assert cells["stprivacy"].backbone == "tokens"


def test_methods_that_need_labels_say_so():
    for name in ("vita", "stprivacy"):
        with pytest.raises(UsageError, match="learns from labels of the privacy images"): minimax.make_networks(settings(name), torch.nn.Conv2d(3, 3, 1), 3, CPU, 0, METHODS[name])
