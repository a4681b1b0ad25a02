"The losses against independent references, over generated inputs."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from penaltyanon.core.files import UsageError
from penaltyanon.train.losses import IMAGENET_STD, anonymizer_objective, dual_ascent, nt_xent, rms, rms_hinge

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)
STD = np.array(IMAGENET_STD).reshape(3, 1, 1, 1)


def pair(seed, n=3, t=2, h=5, w=4):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, t, h, w, generator=g), torch.rand(n, 3, t, h, w, generator=g)


@few
@given(seeds, st.sampled_from(["std", "pixel"]))
def test_rms_is_the_root_mean_square_of_each_clip(seed, units):
    x, y = pair(seed)
    scale = STD if units == "std" else 1
    expected = [np.sqrt((((a - b) / scale) ** 2).mean()) for a, b in zip(x.double().numpy(), y.double().numpy())]
    np.testing.assert_allclose(rms(x, y, units).numpy(), expected, rtol=1e-5)


@few
@given(seeds, st.integers(2, 5))
def test_motion_sees_what_moves_and_nothing_else(seed, t):
    x, y = pair(seed, t=t)
    expected = [np.sqrt(((np.diff(a, axis=1) - np.diff(b, axis=1)) ** 2 / STD ** 2).mean()) for a, b in zip(x.double().numpy(), y.double().numpy())]
    np.testing.assert_allclose(rms(x, y, "motion").numpy(), expected, rtol=1e-4)
    assert rms(x, x + y[:, :, :1], "motion").max() < 1e-5, "redrawn alike in every frame"


@few
@given(seeds)
def test_rms_is_symmetric_and_obeys_the_triangle_inequality(seed):
    (x, y), (z, _) = pair(seed), pair(seed + 1)
    assert torch.allclose(rms(x, y), rms(y, x))
    assert (rms(x, z) <= rms(x, y) + rms(y, z) + 1e-5).all()


@few
@given(seeds, st.floats(0, 3), st.floats(0, 1), st.sampled_from(["clip", "batch"]))
def test_the_hinge_falls_with_B_and_vanishes_above_the_largest_change(seed, B, more, scope):
    x, y = pair(seed)
    assert rms_hinge(x, y, B + more, scope=scope) <= rms_hinge(x, y, B, scope=scope) + 1e-6
    assert rms_hinge(x, y, rms(x, y).max().item() + 1e-5, scope=scope) == 0
    assert rms_hinge(x, y, math.inf, scope=scope) == 0


@few
@given(seeds, st.sampled_from(["clip", "batch"]), st.sampled_from(["std", "pixel", "motion"]))
def test_the_gradient_of_the_hinge(seed, scope, units):
    "Nonzero above B, zero below, finite at the identity: the published penalty had none at all."
    x, y = pair(seed)
    size = rms(x, y, units)
    for B, moves in ((size.min().item() / 2, True), (size.max().item() * 1.01, False)):
        z = y.clone().requires_grad_()
        rms_hinge(x, z, B, units, scope).backward()
        assert (z.grad.abs().max() > 0) == moves
    z = x.clone().requires_grad_()
    rms_hinge(x, z, 0.0, units, scope).backward()
    assert torch.isfinite(z.grad).all()


def brute_force(z1, z2, tau):
    z = torch.cat([z1, z2]).double()
    z, n, total = z / z.norm(dim=1, keepdim=True), len(z1), 0.0
    for i in range(2 * n):
        other = [math.exp(float(z[i] @ z[j]) / tau) for j in range(2 * n) if j != i]
        total -= math.log(math.exp(float(z[i] @ z[(i + n) % (2 * n)]) / tau) / sum(other))
    return total / (2 * n)


@few
@given(seeds, st.integers(2, 6), st.sampled_from([0.1, 0.5, 1.0]))
def test_nt_xent_equals_a_loop(seed, n, tau):
    g = torch.Generator().manual_seed(seed)
    z1, z2 = torch.randn(n, 8, generator=g), torch.randn(n, 8, generator=g)
    assert nt_xent(z1, z2, tau).item() == pytest.approx(brute_force(z1, z2, tau), rel=1e-4)
    assert nt_xent(z1, z2, tau).item() == pytest.approx(nt_xent(z2, z1, tau).item(), rel=1e-5)


@pytest.mark.parametrize("n", [2, 5, 64])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_nt_xent_of_identical_embeddings(n, tau):
    assert nt_xent(torch.ones(n, 3), torch.ones(n, 3), tau).item() == pytest.approx(math.log(2 * n - 1), rel=1e-5)


@few
@given(st.floats(0, 100), st.floats(-1, 1), st.floats(0, 50))
def test_the_multiplier_is_never_negative_and_grows_with_the_violation(memory, violation, lr):
    lam, kept = dual_ascent(memory, violation, lr)
    assert lam >= 0 and kept >= 0
    assert dual_ascent(memory, violation + 0.1, lr)[0] >= lam
    assert dual_ascent(memory, -math.inf, 1.0) == (0.0, 0.0)


def test_lambda_zero_is_spact():
    t, b, p = (torch.tensor(v) for v in (1.0, 2.0, 3.0))
    assert anonymizer_objective(t, b, p, lam=0) == t - b == anonymizer_objective(t, b, torch.tensor(0.0), lam=9)


@pytest.mark.parametrize("B", [-1e-9, math.nan, -math.inf])
def test_a_bad_bound_is_one_line(B):
    x, y = pair(0)
    with pytest.raises(UsageError, match="the bound is a number >= 0") as e: rms_hinge(x, y, B)
    assert "\n" not in str(e.value)
