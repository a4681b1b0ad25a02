"Augmentation: one draw per clip, right axes, values in [0, 1], nothing but the generator decides."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from penaltyanon.core.files import UsageError
from penaltyanon.data.transforms import Augmentation, center_clip, colour_matrix, crop_box, recolour, train_clip

quick = settings(max_examples=60, deadline=None)
unit = st.floats(0, 1)


def noise(t=4, h=30, w=40, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (t, 3, h, w), dtype=np.uint8))
def seeded(seed): return torch.Generator().manual_seed(seed)


@quick
@given(h=st.integers(1, 500), w=st.integers(1, 500), factor=st.floats(0.01, 1), top=unit, left=unit)
def test_crops_lie_inside_and_keep_the_aspect(h, w, factor, top, left):
    rows, columns = crop_box(h, w, factor, top, left)
    assert 0 <= rows.start < rows.stop <= h and 0 <= columns.start < columns.stop <= w
    assert abs(rows.stop - rows.start - h * factor) <= 1 and abs(columns.stop - columns.start - w * factor) <= 1


@quick
@given(t=st.integers(1, 6), h=st.integers(2, 70), w=st.integers(2, 70), size=st.integers(2, 48), seed=st.integers(0, 999), jitter=st.floats(0, 0.9))
def test_any_clip_gives_a_clip(t, h, w, size, seed, jitter):
    clip = noise(t, h, w, seed); before = clip.clone()
    for out in train_clip(clip, size, rng=seeded(seed), options=Augmentation(jitter=jitter)), center_clip(clip, size):
        assert out.shape == (3, t, size, size) and out.dtype == torch.float32 and out.is_contiguous()
        assert 0 <= out.min() and out.max() <= 1 and out.isfinite().all()
    assert torch.equal(clip, before)                                        # the stored clip is not touched


@quick
@given(seed=st.integers(0, 10**6))
def test_one_draw_for_all_frames(seed):
    still = noise(1).expand(5, -1, -1, -1)
    out = train_clip(still, 24, rng=seeded(seed))
    assert torch.equal(out, out[:, :1].expand_as(out))
    clip, order = noise(5), torch.tensor([3, 1, 4, 0, 2])
    assert torch.allclose(train_clip(clip[order], 24, rng=seeded(seed)), train_clip(clip, 24, rng=seeded(seed))[:, order], atol=1e-5)


def test_the_generator_decides_and_nothing_else():
    a = train_clip(noise(), 24, rng=seeded(1)); torch.manual_seed(7); torch.rand(3)
    assert torch.equal(a, train_clip(noise(), 24, rng=seeded(1)))
    assert not torch.equal(a, train_clip(noise(), 24, rng=seeded(2)))


def test_centre_crop_of_a_wide_frame():
    "192 rows by 256 columns of 240 x 320, no black rows, no swap, channels in their places."
    window = torch.zeros(2, 3, 240, 320, dtype=torch.uint8)
    window[:, :, 24:216, 32:288] = torch.tensor([250, 120, 30], dtype=torch.uint8)[:, None, None]
    out = center_clip(window, 56)
    assert torch.allclose(out, (torch.tensor([250, 120, 30]) / 255)[:, None, None, None].expand_as(out), atol=0.01)
    rows = torch.arange(240, dtype=torch.uint8)[:, None].expand(2, 3, 240, 320)     # brightness = row
    out = center_clip(rows, 56)
    assert (out.diff(dim=-2) > 0).all() and (out.diff(dim=-1).abs() < 1e-6).all()


def test_options_off_leave_crop_and_resize():
    off = Augmentation(flip=False, jitter=0, grey=0, erase=0)
    assert torch.allclose(train_clip(noise(), 24, (1, 1), seeded(0), off), center_clip(noise(), 24, 1.0))
    for s in range(30):                                                     # a crop to the right, never a mirror image
        columns = torch.arange(40, dtype=torch.uint8).expand(2, 3, 30, 40)
        assert (train_clip(columns, 24, rng=seeded(s), options=off).diff(dim=-1) >= 0).all()


def test_flip_is_one_for_the_clip_and_half_of_the_time():
    off = Augmentation(jitter=0, grey=0, erase=0)
    columns = torch.arange(40, dtype=torch.uint8).expand(2, 3, 30, 40)
    signs = [torch.sign(train_clip(columns, 24, rng=seeded(s), options=off).diff(dim=-1)).mean((1, 2, 3)) for s in range(200)]
    assert all(len(set(s.round().tolist())) == 1 for s in signs)
    assert 70 < sum(s[0] < 0 for s in signs) < 130


@quick
@given(b=st.floats(0.5, 1.5), s=st.floats(0, 2), h=st.floats(-0.5, 0.5), c=st.floats(0.5, 1.5), grey=unit)
def test_colour_changes_keep_grey_grey(b, s, h, c, grey):
    flat = torch.full((3, 2, 4, 4), grey)
    out = recolour(flat, colour_matrix(b, s, h), c)
    assert torch.allclose(out, torch.full_like(out, min(1.0, b * grey)), atol=1e-4)     # contrast about itself: no change


def test_erased_boxes_stay_inside_and_have_their_size():
    white = torch.full((3, 3, 48, 48), 255, dtype=torch.uint8)
    for s in range(100):
        out = train_clip(white, 48, (1, 1), seeded(s), Augmentation(flip=False, jitter=0, grey=0, erase=1.0))
        black = (out[0, 0] == 0)
        assert 8 * 8 <= black.sum() <= 2 * 16 * 16 and set(out.unique().tolist()) == {0.0, 1.0}


def test_errors():
    for call in lambda: center_clip(noise(), 24, 0), lambda: center_clip(noise(), 24, 1.5), lambda: train_clip(noise(), 24, (80, 80)), lambda: train_clip(noise() / 255, 24):
        with pytest.raises(UsageError, match="crop =|give uint8"): call()
