"The anonymizers that learn nothing: the contract, the bounds they promise, and a detector that fails in every way."
import copy, itertools, math, pickle, sys, types
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from penaltyanon.nets.anonymizers import anonymize_clip
from penaltyanon.core.files import UsageError, UserError
from penaltyanon.nets.obfuscation import (OBFUSCATIONS, OPERATIONS, Obfuscation, blur, box_mask, box_regions, detector_regions, difference_mask, downsample,
                                          scale_kernel, onnx_regions, open_obfuscation, people_regions, pixelate, whole_frame)
from penaltyanon.data.video import read_frames, write_video
from penaltyanon.data.puppets import draw_clip, draw_scene

NAMES, CHANGING = list(OBFUSCATIONS), [n for n in OBFUSCATIONS if n != "raw"]
size = st.integers(1, 90)
fast = settings(max_examples=40, deadline=None)


def frames(seed, n, h, w):
    "Noise, black-and-white noise, a flat frame: pictures that go to the ends of the range."
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed))
    return (x, x.round(), x[..., :1, :1].expand(n, 3, h, w).contiguous())[seed % 3]


def contrast(x): return (x.amax((-2, -1)) - x.amin((-2, -1))).amax().item()
def step(x): return max([x.diff(dim=d).abs().max().item() for d in (-2, -1) if x.shape[d] > 1], default=0.)


# ---- the contract
@pytest.mark.parametrize("name", NAMES)
@fast
@given(size, size, st.integers(0, 3), st.integers(0, 999))
def test_same_shape_in_range_and_the_same_every_time(name, h, w, n, seed):
    x = frames(seed, n, h, w) if n else torch.rand(0, 3, h, w)
    before = x.clone()
    with torch.no_grad(): y, again = OBFUSCATIONS[name]()(x), OBFUSCATIONS[name]()(x)
    assert y.shape == x.shape and y.dtype == torch.float32 and torch.equal(y, again)
    assert not n or (y.min() >= 0 and y.max() <= 1)
    assert torch.equal(x, before), "the input is never written to"


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_does_not_depend_on_its_neighbours(name):
    "So a video is causal, and a batch gives what single frames give."
    clip, f = torch.rand(1, 3, 5, 33, 47), OBFUSCATIONS[name](detector_regions(lambda f: [(0, 0, 20, 20)] if f[0, 0, 0] > .5 else []))
    out = anonymize_clip(f, clip)
    for t in range(5): assert torch.allclose(out[:, :, t], f(clip[:, :, t]), atol=1e-6)
    later = clip.clone(); later[:, :, 3:] = 0
    assert torch.allclose(anonymize_clip(f, later)[:, :, :3], out[:, :, :3], atol=1e-6)


def assert_constant(f, x): assert not f(x).requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_copied_sent_and_differentiated(name):
    x = torch.rand(2, 3, 20, 24, requires_grad=True)
    f = OBFUSCATIONS[name]()
    assert torch.equal(copy.deepcopy(f)(x), f(x)) and pickle.dumps(f)
    assert not list(f.parameters()) and not f.state_dict()
    if name == "blackening": return assert_constant(f, x)
    f.train()(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_other_input_is_one_clear_line():
    f = OBFUSCATIONS["blur-weak"]()
    with pytest.raises(UsageError, match="use anonymize_clip"): f(torch.rand(1, 3, 4, 8, 8))
    with pytest.raises(UsageError, match="divide by 255"): f(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UsageError, match="did you mean 'pixelate'"): open_obfuscation("pixelat")
    with pytest.raises(UsageError, match="did you mean 'whole'"): open_obfuscation("pixelate@hole")
    for bad in (dict(kernel=20), dict(kernel=-1), dict(sigma=-1.), dict(sigma=math.nan)):
        with pytest.raises(UsageError, match="odd kernel and sigma"): blur(torch.rand(1, 3, 8, 8), **bad)


# ---- degenerate cases
@fast
@given(size, size, st.integers(0, 999))
def test_nothing_to_do_changes_no_bit(h, w, seed):
    x = frames(seed, 2, h, w)
    for y in (downsample(x, 1), blur(x, sigma=0.), blur(x, kernel=1), OBFUSCATIONS["raw"]()(x)): assert torch.equal(y, x)


@pytest.mark.parametrize("name", [n for n in CHANGING if n != "blackening"])
@fast
@given(size, size, st.floats(0, 1, width=32))
def test_one_colour_stays_this_colour(name, h, w, value):
    x = torch.full((1, 3, h, w), value)
    assert torch.allclose(OPERATIONS[name](x), x, atol=1e-5)


@pytest.mark.parametrize("name", CHANGING)
def test_no_small_frame_slips_through(name):
    "Kernels, cells and factors are rounded so that from two pixels on something happens."
    for h, w in itertools.product(range(1, 14), repeat=2):
        if h * w == 1 or name == "downsample-4x" and max(h, w) == 1: continue
        checker = ((torch.arange(h)[:, None] + torch.arange(w)) % 2).float().expand(1, 3, h, w)
        assert (OPERATIONS[name](checker) - checker).abs().max() > .1, (h, w)


# ---- what is promised
@fast
@given(st.integers(1, 700), st.sampled_from([(21, 10.), (13, 10.), (3, 1.)]))
def test_a_kernel_grows_with_the_frame_and_keeps_its_form(short, kernel_sigma):
    (k, s), (k0, s0) = scale_kernel(short, *kernel_sigma), kernel_sigma
    assert k % 2 == 1 and (k - 1) / 2 / short >= (k0 - 1) / 2 / 112        # never weaker than at 112
    assert k // 2 < k0 // 2 * short / 112 + 1                                    # and not a whole pixel stronger
    assert math.isclose(s / (k // 2), s0 / (k0 // 2))


@pytest.mark.parametrize("name,k", [("blur-strong", 21), ("blur-weak", 13)])
@fast
@given(size, size, st.integers(0, 999))
def test_blurred_neighbours_differ_by_the_middle_weight_at_most(name, k, h, w, seed):
    x, (k, s) = frames(seed, 1, h, w), scale_kernel(min(h, w), k, 10)
    middle = 1 / sum(math.exp(-.5 * (i / s) ** 2) for i in range(-(k // 2), k // 2 + 1))
    assert step(OPERATIONS[name](x)) <= middle * contrast(x) + 1e-5


def test_the_detour_of_large_frames_keeps_the_bound():
    x = torch.rand(1, 3, 500, 460).round()
    assert step(blur(x)) <= .057 / 4 and step(blur(x, 13)) <= .083 / 4      # four pixels to one of the small picture


@fast
@given(size, size, st.integers(1, 9), st.integers(0, 999))
def test_downsampled_neighbours_differ_by_one_over_the_factor_at_most(h, w, factor, seed):
    x = frames(seed, 1, h, w)
    assert step(downsample(x, factor)) <= contrast(x) / factor + 1e-5


@fast
@given(size, size, st.integers(1, 20), st.integers(0, 999))
def test_a_mosaic_has_one_colour_in_each_cell_and_no_more_cells_than_it_says(h, w, cells, seed):
    x = frames(seed, 1, h, w)
    y, a = pixelate(x, cells), max(2, math.ceil(min(h, w) / cells))
    for i, j in itertools.product(range(0, h, a), range(0, w, a)):
        cell, raw = y[..., i:i + a, j:j + a], x[..., i:i + a, j:j + a]
        assert torch.equal(cell, cell[..., :1, :1].expand_as(cell))
        if raw.shape == (1, 3, a, a): assert torch.allclose(cell[..., 0, 0], raw.mean((-2, -1)), atol=1e-5)
    assert -(-min(h, w) // a) <= cells


@fast
@given(st.sampled_from(NAMES), size, size, st.lists(st.tuples(*[st.floats(-20, 110)] * 4), max_size=3), st.integers(0, 999))
def test_outside_the_boxes_no_bit_changes_and_inside_all_is_the_operations(name, h, w, found, seed):
    x, f = frames(seed, 2, h, w), OBFUSCATIONS[name](box_regions(*found))
    inside, y, whole = box_mask(found, h, w), f(x), OPERATIONS[name](x).clamp(0, 1)
    if not inside.any(): inside = torch.ones_like(inside)
    inside = inside.expand(2, 3, h, w)
    assert torch.equal(y[~inside], x[~inside]) and torch.equal(y[inside], whole[inside])
    assert f.frames == 2 and f.fallback == 2 * (not box_mask(found, h, w).any())


@fast
@given(size, size, st.tuples(*[st.floats(-20, 110)] * 4))
def test_a_mask_holds_every_pixel_that_its_box_touches(h, w, box):
    x1, y1, x2, y2 = box
    mask = box_mask([box], h, w)[0]
    for i, j in itertools.product(range(h), range(w)):
        if x1 < x2 and y1 < y2 and j < x2 and j + 1 > x1 and i < y2 and i + 1 > y1: assert mask[i, j]
    assert mask.sum() <= (max(x2 - x1, 0) + 2) * (max(y2 - y1, 0) + 2)


# ---- fail closed
def raises(error):
    def finder(x): raise error
    return finder


@pytest.mark.parametrize("finder", [box_regions(), box_regions((999, 999, 1000, 1000)), box_regions((9, 9, 2, 2)), box_regions((0, math.nan, 1, 1)), box_regions((0, 0, math.inf, 9)),
    raises(RuntimeError("x")), raises(UserError("x")), raises(AssertionError()), lambda x: None, lambda x: torch.ones(1, 1, 2, 2, dtype=torch.bool),
    lambda x: torch.ones(len(x), 1, *x.shape[-2:]), lambda x: torch.zeros_like(x[:, :1], dtype=torch.bool)])
@pytest.mark.parametrize("name", CHANGING)
def test_no_detection_never_means_a_raw_frame(finder, name):
    x, f = torch.rand(3, 3, 30, 40), OBFUSCATIONS[name](finder)
    assert torch.equal(f(x), OBFUSCATIONS[name]()(x))
    assert f.frames == f.fallback == 3 and f.label.endswith("3 of 3 frames full-frame)")


def test_only_the_frame_that_fails_falls_back():
    def finder(x):
        if any(f.mean() < .1 for f in x): raise ValueError("too dark")
        return whole_frame(x) & (torch.arange(x.shape[-1]) < 4)
    x = torch.rand(5, 3, 8, 8); x[3] = .05
    f = Obfuscation("blackening", finder)
    y = f(x)
    assert (f.frames, f.fallback, f.error) == (5, 1, "ValueError: too dark")
    assert y[3].abs().max() == 0 and torch.equal(y[[0, 1, 2, 4]][..., 4:], x[[0, 1, 2, 4]][..., 4:])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
def test_running_out_of_memory_is_the_callers_business(error):
    with pytest.raises(type(error)): Obfuscation("pixelate", raises(error))(torch.rand(2, 3, 8, 8))


def test_an_operation_of_ones_own():
    f = Obfuscation("negative", box_regions((0, 0, 2, 2)), operation=lambda x: 1 - x)
    x = torch.rand(1, 3, 4, 4)
    assert torch.equal(f(x)[..., :2, :2], 1 - x[..., :2, :2]) and torch.equal(f(x)[..., 2:], x[..., 2:])


# ---- detectors
class FakeHOG:
    "Sees one person, 32 pixels wide and 64 high, at (64, 128)."
    def setSVMDetector(self, svm): assert svm == "people"
    def detectMultiScale(self, image, **kwargs):
        FakeHOG.saw = image
        return np.array([[64, 128, 32, 64]]), np.array([1.])


def test_people_asks_opencv_in_its_own_pixels_and_colours(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(HOGDescriptor=FakeHOG, HOGDescriptor_getDefaultPeopleDetector=lambda: "people"))
    x = torch.zeros(1, 3, 128, 160); x[:, 0] = 1                     # red
    mask = people_regions()(x)
    assert FakeHOG.saw.shape == (256, 320, 3) and FakeHOG.saw.dtype == np.uint8 and FakeHOG.saw[0, 0].tolist() == [0, 0, 255]    # BGR
    assert torch.equal(mask[0], box_mask([(32, 64, 48, 96)], 128, 160))
    people_regions()(torch.zeros(1, 3, 1, 1)), people_regions()(torch.zeros(1, 3, 300, 400))
    assert FakeHOG.saw.shape == (300, 400, 3), "a large frame stays as it is"
    assert open_obfuscation("blackening@people").label == "blackening (people)"


@pytest.mark.parametrize("cv2,why", [(None, "not installed"), (types.SimpleNamespace(__version__="5.0.0"), "OpenCV 5.0.0 has no people detector")])
def test_without_opencvs_detector_there_is_one_line_and_no_silent_fallback(monkeypatch, cv2, why):
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    with pytest.raises(UserError, match=why) as e: open_obfuscation("blur-strong@people")
    assert "penaltyanon[detect]" in str(e.value) and "\n" not in str(e.value)


def test_opencvs_people_detector_itself():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    if not hasattr(cv2, "HOGDescriptor"): pytest.skip(f"this build of OpenCV {cv2.__version__} has no HOGDescriptor (opencv-contrib-python-headless has)")
    f, x = open_obfuscation("blackening@people"), torch.rand(3, 3, 120, 160)
    assert torch.equal(f(x), f(x)) and f.frames == 6 and f.error is None
    assert f(torch.rand(1, 3, 1, 1)).abs().max() == 0 and f.error is None


def onnx_file(path, rows, shape=(1, 3, 64, 64), inputs=1, op=None):
    "A detector that answers with fixed rows, or (op) with an ONNX operator of its input."
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    info = lambda name, dims: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
    node = onnx.helper.make_node(op, ["images0"], ["boxes"]) if op else onnx.helper.make_node(
        "Constant", [], ["boxes"], value=onnx.numpy_helper.from_array(np.array([rows], np.float32), "rows"))
    graph = onnx.helper.make_graph([node], "toy", [info(f"images{i}", shape) for i in range(inputs)], [info("boxes", None)])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_an_onnx_detectors_boxes_come_back_to_the_frame(tmp_path):
    path = onnx_file(tmp_path/"a.onnx", [(16, 8, 32, 40, .9, 0), (0, 0, 8, 8, .4, 1), (50, 50, 60, 60, .1, 0), (0, 0, 0, 0, 0, 0)])
    for h, w, scale in ((128, 128, .5), (64, 32, 1), (32, 64, 1), (256, 100, .25)):
        x = torch.rand(2, 3, h, w)
        expected = box_mask(np.array([(16, 8, 32, 40), (0, 0, 8, 8)]) / scale, h, w)
        assert torch.equal(onnx_regions(path)(x), expected.expand(2, 1, h, w))
        assert torch.equal(onnx_regions(path, classes=(1,))(x)[0], box_mask([(0, 0, 8 / scale, 8 / scale)], h, w))
        assert torch.equal(onnx_regions(path, threshold=.5, margin=.5)(x)[0], box_mask(np.array([(8, -8, 40, 56)]) / scale, h, w))
    assert not onnx_regions(path, threshold=.99)(x).any()
    f = open_obfuscation(f"blackening@{path}")
    f(x); assert (f.frames, f.fallback) == (2, 0)


def test_what_an_onnx_detector_sees(tmp_path):
    "The frame in the corner, its form kept, and grey: an operator that hands the picture through as rows."
    seen = {}
    path = onnx_file(tmp_path/"a.onnx", [(0, 0, 1, 1, 1)], shape=(1, 3, "h", "w"))
    import onnxruntime
    real = onnxruntime.InferenceSession.run
    class Spy(onnxruntime.InferenceSession):
        def run(self, names, feed): seen.update(feed); return real(self, names, feed)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(onnxruntime, "InferenceSession", Spy)
        onnx_regions(path, size=96)(torch.full((1, 3, 48, 24), .8))
    image = seen["images0"]
    assert image.shape == (1, 3, 96, 96) and image.dtype == np.float32
    assert np.allclose(image[..., :48], .8, atol=1e-6) and np.allclose(image[..., 48:], 114 / 255)


@pytest.mark.parametrize("kwargs", [dict(rows=[(1, 2, 3)]), dict(rows=[[.9] * 85] * 100), dict(rows=[[.9] * 840] * 84), dict(rows=[(0, 0, 1, 1, 1)], inputs=2), dict(rows=None, op="Relu"), dict(rows=None, op="Softplus", shape=(3,))])
def test_another_kind_of_onnx_file_is_refused_before_any_frame(tmp_path, kwargs):
    with pytest.raises(UserError, match="a.onnx") as e: onnx_regions(onnx_file(tmp_path/"a.onnx", **kwargs))
    assert "\n" not in str(e.value)


def test_a_missing_runtime_or_file_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file"): open_obfuscation(f"pixelate@{tmp_path}/none.onnx")
    (tmp_path/"b.onnx").write_bytes(b"\0" * 99)
    with pytest.raises(UserError, match="not a readable ONNX file"): onnx_regions(tmp_path/"b.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"penaltyanon\[edge\]"): onnx_regions(tmp_path/"b.onnx")


# ---- the true regions of puppets
@pytest.mark.parametrize("seed", range(3))
def test_the_difference_to_the_twins_background_is_the_puppet_even_from_a_file(tmp_path, seed):
    scene = draw_scene(np.random.default_rng(seed), "Walk", (1, 1, 0, 1, 0))
    raw, twin = draw_clip(scene, 6), draw_clip(scene, 6, oracle=True)
    nobody = torch.from_numpy(np.array(scene.backdrop.reduce(2))).permute(2, 0, 1) / 255
    exact = difference_mask(raw / 255, nobody)
    write_video(tmp_path/"twin.avi", twin, qmin=2, qmax=2)
    from_file = difference_mask(read_frames(tmp_path/"twin.avi", range(6)) / 255, 208 / 255, .05)
    overlap = (exact & from_file).sum() / (exact | from_file).sum()
    assert .1 < exact.float().mean() < .5 and overlap > .9, overlap
    black = Obfuscation("blackening", lambda x: exact)(raw / 255)
    assert torch.equal(black, torch.where(exact, 0, raw / 255))
