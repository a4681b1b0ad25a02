"Scores against scikit-learn and by construction; an evaluation that cannot see must say chance."
from dataclasses import replace
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score
from penaltyanon.evaluate import attackers as ev
from penaltyanon.nets.anonymizers import Identity
from penaltyanon.core.checkpoints import RunContext
from penaltyanon.core.machine import seed_everything
from penaltyanon.core.settings import resolve
from penaltyanon.evaluate.intervals import accuracies, resample_counts, percentile_interval
from penaltyanon.train.losses import attribute_loss
from penaltyanon.nets.recognizers import PRIVACY_MODELS, build_model

CONTEXT = RunContext(resolve("smoke", precision="fp32", eval_batch=8), torch.device("cpu"), progress=False)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(8, 60))
def test_cmap_is_scikit_learns(seed, n):
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(n, 3)), (rng.random((n, 3)) < 0.5).astype(float)
    scores = ev.privacy_scores(z, y, ("a", "b", "c"))
    for name, s in scores.items():
        i = "abc".index(name)
        assert s["ap"] == pytest.approx(100 * average_precision_score(y[:, i], z[:, i]))
        assert s["base"] == pytest.approx(100 * y[:, i].mean())
        assert 0 <= s["f1_logit"] <= 1 and 0 <= s["f1"] <= 1


def test_unknown_labels_do_not_count():
    z, y = np.array([[3.0], [-3.0], [9.0]]), np.array([[1.0], [0.0], [np.nan]])
    assert ev.privacy_scores(z, y, ("a",))["a"]["base"] == 50
    assert np.isnan(ev.mean_score({}, "ap"))


def test_the_bootstrap_covers_about_95_percent():
    rng, inside = np.random.default_rng(0), 0
    for k in range(200):
        hits = rng.random(100) < 0.7
        low, high = percentile_interval(accuracies(np.eye(2)[hits.astype(int)], np.ones(100, int), resample_counts(100, 300, seed=k)))
        inside += low <= 70 <= high
    assert 180 <= inside <= 199


class Frames:
    "Frames whose brightness tells the attribute"
    def __init__(self, n, seed): self.n, self.seed = n, seed
    def __len__(self): return self.n
    def set_epoch(self, e): self.epoch = e
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(self.seed * 1000 + i)
        y = float(torch.rand((), generator=g) < 0.5)
        return dict(frame=(0.3 + 0.4 * y + 0.05 * torch.rand(3, 16, 16, generator=g)), attributes=torch.tensor([y]))


class Grey(torch.nn.Module):
    def forward(self, x): return torch.full_like(x, 0.5)


@pytest.mark.parametrize("f_A, sees", [(Identity(), True), (Grey(), False)])
def test_an_attacker_finds_what_is_there_and_nothing_else(f_A, sees):
    seed_everything(0)
    train, test = (ev.anonymize_dataset(f_A, Frames(n, k), CONTEXT, epochs=e) for n, k, e in ((64, 0, 2), (100, 1, 1)))
    assert train.x.shape == (64, 2, 3, 16, 16) and train.x.dtype == torch.uint8
    net = build_model("r2d_small", 1, PRIVACY_MODELS)
    ev.fit_attacker(net, train.x, train.attributes, torch.arange(64) % 8 == 0, ev.AttackerRecipe(attribute_loss, 6, 3e-3), CONTEXT)
    scores = ev.privacy_scores(ev.predict_logits(net, test.x, CONTEXT).mean(1).numpy(), test.attributes.numpy(), ("bright",))
    assert (scores["bright"]["ap"] > 95) if sees else (scores["bright"]["ap"] < scores["bright"]["base"] + 1)


def test_anonymized_values_are_those_of_the_anonymizer():
    class Half(torch.nn.Module):
        def forward(self, x): return x / 2
    data = Frames(5, 0)
    r = ev.anonymize_dataset(Half(), data, CONTEXT)
    x = torch.stack([data[i]["frame"] for i in range(5)])
    assert (r.x[:, 0].float() / 255 - x / 2).abs().max() <= 0.5 / 255 + 1e-6
    assert r.rms["pixel"] == pytest.approx((x / 2).square().mean((1, 2, 3)).sqrt().mean().item(), rel=1e-4)


def test_the_epoch_is_chosen_on_held_out_training_data():
    "The kept weights are those of the epoch with the lowest held-out loss, which need not be the last."
    seed_everything(0)
    r, rows = ev.anonymize_dataset(Identity(), Frames(32, 0), CONTEXT), []
    noise = torch.rand(32, 1).round()
    held = torch.arange(32) % 4 == 0
    net, recipe = build_model("r2d_small", 1, PRIVACY_MODELS), ev.AttackerRecipe(attribute_loss, 8, 1e-2)
    ev.fit_attacker(net, r.x, noise, held, recipe, replace(CONTEXT, log=rows.append))
    kept = float(attribute_loss(ev.predict_logits(net, r.x[held], CONTEXT).mean(1), noise[held]))
    assert kept == pytest.approx(min(r["held_loss"] for r in rows), rel=1e-3)
