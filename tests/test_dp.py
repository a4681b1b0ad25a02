"Masked differential privacy: what must hold for every training, tried on tiny networks (each room's own lessons: nbs/dp)."
import dataclasses, json, math, subprocess, sys
import numpy as np, pytest, torch
from scipy.stats import beta
from torch import nn
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.dp.accountants import NoisySteps, pld_epsilon, prv_epsilon, rdp_epsilon
from penaltyanon.dp.maskdp import add_noise, draw_poisson, make_chance, make_maskdp, private_part
from penaltyanon.dp.plan import explain_statement
from penaltyanon.dp.residuals import TokenRecords, add_residuals, hide_all, public_gradient
from penaltyanon.dp.tokens import TokenGrid
from penaltyanon.dp.transformer import TAINTS, TokenNet, taint_tokens

GRID = TokenGrid(frames=2, size=16, tubelet=2, patch=8)     # four tokens
FAST = dict(delta=1e-3, accountant="rdp")


class Linear(nn.Module):
    "The smallest network that keeps the contract: the mean of kept tokens, and a layer."
    def __init__(self, values, classes):
        super().__init__()
        self.head = nn.Linear(values, classes)

    def forward(self, tokens, keep, places=None):
        kept = torch.where(keep[..., None], tokens, 0)
        return self.head(kept.sum(1) / keep.sum(1, keepdim=True).clamp_min(1))


def make_records(n=24, clips=1, values=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return TokenRecords(torch.randn(n, clips, 4, values, generator=g), torch.rand(n, clips, 4, generator=g) < .5, torch.randint(0, 3, (n,), generator=g))


def make_run(records, net=None, lr=.1, **options):
    torch.manual_seed(0)
    net = net or Linear(records.tokens.shape[-1], 3)
    return make_maskdp(net, torch.optim.SGD(net.parameters(), lr=lr), records, **FAST | dict(noise_multiplier=1., epochs=2, batch_size=6) | options)


def flat(gradient): return torch.cat([g.flatten() for g in gradient.values()])


@pytest.mark.parametrize("clips", [1, 3])
def test_a_video_counts_once_however_many_clips_it_has(clips):
    records, C = make_records(clips=clips), .1
    net = Linear(6, 3)
    norms = [flat(add_residuals(net, records[i:i + 1], C)).norm() for i in range(6)]
    assert max(norms) <= C*1.0001 and max(norms) > .99*C         # not `clips` times C


def test_values_that_are_not_finite_do_not_get_around_the_clipping():
    records = make_records()
    for bad in (math.nan, math.inf, 1e30):
        tokens = records.tokens.clone()
        tokens[0] = taint_tokens(tokens[0], records.public[0], bad)
        torch.manual_seed(0)
        net = Linear(6, 3)
        tainted = dataclasses.replace(records, tokens=tokens)
        with_it, without = flat(add_residuals(net, tainted, .5)), flat(add_residuals(net, records[1:], .5))
        assert with_it.isfinite().all() and (with_it - without).norm() <= .5001


@pytest.mark.parametrize("value", TAINTS)
def test_a_step_without_the_private_part_is_blind_to_sensitive_tokens(value):
    records = make_records(values=GRID.values)
    torch.manual_seed(0)
    net = TokenNet(GRID, 3)
    tainted = dataclasses.replace(records, tokens=taint_tokens(records.tokens, records.public, value))
    a, b = (flat(public_gradient(net, r, 24)[0]) for r in (records, tainted))
    assert torch.equal(a, b)


def test_the_noise_of_a_step_is_what_the_accountant_was_told():
    records = make_records()
    run = make_run(records, noise_multiplier=3., clip=.2, seed=0)
    nobody = torch.tensor([], dtype=torch.long)
    values = torch.cat([flat(private_part(run.training, nobody)) for _ in range(2000)])
    t = run.training
    wanted = 3*.2/(t.mechanism.rate*len(records))
    assert abs(values.std()/wanted - 1) < 4/math.sqrt(2*len(values)) and abs(values.mean()) < 4*wanted/math.sqrt(len(values))


def test_a_step_that_draws_nobody_moves_the_weights_by_noise_alone():
    records = hide_all(make_records(n=3))                       # nothing public: no public gradient
    run = make_run(records, batch_size=1, epochs=40, seed=5)
    empty = 0
    for _ in range(20):
        state = run.training.chance.draws.get_state()
        drawn = draw_poisson(3, run.training.mechanism.rate, run.training.chance.draws)
        run.training.chance.draws.set_state(state)
        before = run.training.net.head.weight.detach().clone()
        run.step()
        moved = (run.training.net.head.weight - before).abs().min()
        assert moved > 0
        empty += not len(drawn)
    assert empty > 2


def test_draws_are_independent_of_public_batches_and_of_noise():
    chance = make_chance(1, "cpu")
    draws = torch.rand(20000, generator=chance.draws)
    for other in (chance.noise, chance.batches):
        assert abs(np.corrcoef(draws, torch.rand(20000, generator=other))[0, 1]) < .03


@pytest.mark.parametrize("noise, rate, steps", [(1., 512/12000, 468), (2., .01, 1000), (4., .2, 100)])
def test_accountants_agree(noise, rate, steps):
    plan = NoisySteps(rate, noise, steps)
    prv, pld, rdp = prv_epsilon(plan, 1e-5), pld_epsilon(plan, 1e-5), rdp_epsilon(plan, 1e-5)
    assert abs(prv - pld) < max(.011, .01*pld)                  # opacus adds its allowed error of .01
    assert pld < rdp < 1.2*pld + .05


def canary_score(held, rounds, noise):
    "What an observer of all steps sees of one record, which is there or not: noisy sums along the canary's direction."
    records = hide_all(make_records(n=4, values=3))
    tokens = records.tokens.clone()
    tokens[0] = 40.                                             # a residual beyond the clipping norm
    run = make_run(dataclasses.replace(records, tokens=tokens), lr=0., batch_size=2, epochs=4, noise_multiplier=noise, clip=1., seed=int(held))
    t = run.training
    each = torch.stack([flat(add_residuals(t.net, t.records[i:i + 1], 1.)) for i in range(4)])      # weights stay: lr = 0
    assert math.isclose(each[0].norm(), 1., rel_tol=1e-3)
    along = each @ each[0]                                      # what each record adds along the canary
    drawn = torch.zeros(rounds*t.mechanism.steps*4)
    drawn[draw_poisson(len(drawn), t.mechanism.rate, t.chance.draws)] = 1.
    drawn = drawn.view(rounds, -1, 4)
    if not held: drawn[..., 0] = 0.                             # zero-out neighbour: its residual is zero
    sums = add_noise(dict(a=drawn @ along), noise*1., t.chance.noise)["a"]
    return sums.sum(1).numpy(), t


def audited_epsilon(held, without, delta, confidence=.95):
    "A lower bound of eps from guesses: Clopper and Pearson on a threshold chosen from the first half."
    half, best = len(held) // 2, 0.
    cut = np.quantile(without[:half], .9)
    low = lambda k, n: beta.ppf((1 - confidence)/2, k, n - k + 1) if k else 0.
    high = lambda k, n: beta.ppf(1 - (1 - confidence)/2, k + 1, n - k) if k < n else 1.
    for a, b in ((held[half:] > cut, without[half:] > cut), (without[half:] <= cut, held[half:] <= cut)):
        power, size = low(a.sum(), len(a)), high(b.sum(), len(b))
        if power > delta: best = max(best, math.log((power - delta)/size))
    return best


def test_a_canary_finds_no_more_than_is_claimed_and_does_find_missing_noise():
    (held, t), (without, _) = canary_score(True, 4000, 2.), canary_score(False, 4000, 2.)
    claimed = rdp_epsilon(t.mechanism, 1e-3)
    assert 0 < audited_epsilon(held, without, 1e-3) < claimed
    (held, _), (without, _) = canary_score(True, 4000, .2), canary_score(False, 4000, .2)     # a tenth of the noise
    assert audited_epsilon(held, without, 1e-3) > claimed, "noise that is missing is found"


@pytest.mark.parametrize("options, why", [
    (dict(target_epsilon=1.), "not both"), (dict(noise_multiplier=None), "not both"), (dict(noise_multiplier=0.), "above 0"),
    (dict(adjacency="remove"), "zero_out or replace"), (dict(sampling="poisson"), "independent or shared or full"), (dict(clip=-1.), "clip=-1.0"),
    (dict(delta=.5), "give less than 1/"), (dict(publik_weight=1.), "did you mean public_weight?")])
def test_options_that_cannot_be_right_are_one_line(options, why):
    with pytest.raises(UsageError, match=why.replace("?", r"\?")): make_run(make_records(), **options)


@pytest.mark.parametrize("layer, why", [
    (nn.BatchNorm1d(6), "mixes records"), (nn.Dropout(.1), "drops at random"), (nn.Conv3d(3, 4, (3, 3, 3), (2, 2, 2)), "overlap")])
def test_networks_that_break_the_rules_are_refused_by_name(layer, why):
    net = Linear(6, 3)
    net.extra = layer
    with pytest.raises(UsageError, match=f"model: extra .*{why}"): make_run(make_records(), net=net)


def test_loaders_and_masks_of_the_wrong_shape_are_refused():
    records = make_records()
    loader = torch.utils.data.DataLoader(range(24), batch_size=6, shuffle=True)
    net = Linear(6, 3)
    with pytest.raises(UsageError, match="coin flips"): make_maskdp(net, torch.optim.SGD(net.parameters(), .1), loader, noise_multiplier=1.)
    with pytest.raises(UsageError, match="mask of shape"): dataclasses.replace(records, public=records.public[:, :, :2])


@pytest.mark.parametrize("sampling", ["independent", "shared", "full"])
@pytest.mark.parametrize("adjacency", ["zero_out", "replace"])
def test_every_way_to_train_ends_with_its_statement(sampling, adjacency):
    run = make_run(make_records(), target_epsilon=20., noise_multiplier=None, sampling=sampling, adjacency=adjacency)
    run.train(progress=False)
    statement = run.statement()
    assert json.loads(json.dumps(statement)) == statement and 15 < statement["epsilon"] <= 20.
    text = " ".join(explain_statement(statement).split())
    assert ("replacing" in text) == (adjacency == "replace") and f"{sampling} batches" in text and "labels, masks" in text
    with pytest.raises(UserError, match="is spent"): run.step()


def test_the_seed_is_a_caveat_and_noise_never_lies_in_a_file(tmp_path):
    from penaltyanon.core.checkpoints import read_checkpoint
    for seed, said in ((0, True), (None, False)):
        run = make_run(make_records(), seed=seed)
        run.train(tmp_path/str(seed), progress=False)
        assert any("seed" in line for line in run.statement()["outside"]) == said
        assert ("chance" in read_checkpoint(tmp_path/str(seed)/"maskdp.ckpt")) == said


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_dp import make_records, make_run
import penaltyanon.dp.maskdp as m
seed, after = {seed}, {after}
def die(gradient, *rest, made=[0], real=m.add_noise):
    made[0] += 1
    if made[0] == after: os._exit(9)         # the budget of this step is written down, its noise is not drawn
    return real(gradient, *rest)
m.add_noise = die
run = make_run(make_records(), epochs=4, seed=seed)
run.train({folder!r}, save_steps=4, progress=False)
"""


@pytest.mark.parametrize("seed", [3, None])
def test_a_kill_gives_no_budget_back(tmp_path, seed):
    from pathlib import Path
    code = KILLED.format(tests=str(Path(__file__).parent), seed=seed, after=7, folder=str(tmp_path))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert json.loads((tmp_path/"maskdp.budget.json").read_text())["steps"] == 7
    run = make_run(make_records(), epochs=4, seed=seed)
    run.train(tmp_path, progress=False)
    t = run.training
    assert t.charged == t.mechanism.steps == run.statement()["mechanism"]["steps"]
    lost = 0 if seed is not None else 3                          # the checkpoint was made after step 4
    assert t.made == t.mechanism.steps - lost
    if seed is not None:
        whole = make_run(make_records(), epochs=4, seed=seed)
        whole.train(progress=False)
        assert all(torch.equal(a, b) for a, b in zip(whole.training.net.parameters(), t.net.parameters()))


@pytest.mark.parametrize("how", ["head", "bias", "lora"])
def test_only_what_is_trained_is_clipped_gets_noise_and_moves(how):
    from penaltyanon.dp.transformer import freeze_net
    records = make_records(values=GRID.values)
    net = freeze_net(TokenNet(GRID, 3), how)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1)
    make_maskdp(net, optimizer, records, noise_multiplier=1., batch_size=6, **FAST).step()
    assert {name for name, p in net.named_parameters() if not torch.equal(p, before[name])} == {name for name, p in net.named_parameters() if p.requires_grad}
