"Who is hidden stays hidden: detectors, the tracker with a scripted detector, and the command with both."
import json, os, random, subprocess, sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
import av, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from conftest import ROOT, SHARED
from penaltyanon.core.files import UserError, cache_folder
from penaltyanon.data.detectors import as_boxes, box_overlaps, fill_boxes, open_detector
from penaltyanon.data.video import StreamInfo
from penaltyanon.edge.anonymize import Options, anonymize_file, write_preview
from penaltyanon.edge.guards import FrameAnonymizer
from penaltyanon.edge.images import load_image, save_image
from penaltyanon.edge.streams import Frame, VideoWriter, decode_frames
from penaltyanon.edge.tracker import GROWTH, RegionLog, Tracker, TrackSettings, move_box, region_stage, widen_boxes
from test_anonymize import call as command      # noqa: F401 (a fixture)

H, W, SIDE = 72, 160, 12
INFO = StreamInfo(W, H, Fraction(1, 25), Fraction(25))
BLACK = FrameAnonymizer(np.zeros_like, "black")
fast = settings(max_examples=60, deadline=None)


def draw(*spots, ground=40):
    "A frame with white spots (left, top)."
    rgb = np.full((H, W, 3), ground, np.uint8)
    for x, y in spots: rgb[max(y, 0):max(y + SIDE, 0), max(x, 0):max(x + SIDE, 0)] = 255
    return rgb


def box(x, y): return (x, y, x + SIDE, y + SIDE)


class Scripted:
    "A detector that says what is written for the frame of this number, which the frame carries in its last row."
    def __init__(self, script): self.script, self.asked = script, 0
    def __call__(self, rgb):
        self.asked += 1
        return self.script[int(rgb[-1, 0, 0]) + 256 * int(rgb[-1, 0, 1])]


def film_of(spots, ground=40):
    "Frames with their numbers; spots[t] = positions in frame t, None = no pixels."
    for t, here in enumerate(spots):
        rgb = None if here is None else draw(*here, ground=ground)
        if rgb is not None: rgb[-1, 0] = t % 256, t // 256, 0
        yield Frame(rgb, 100 * t, 100, INFO)


def track(spots, script, **how):
    log = RegionLog()
    return list(region_stage(film_of(spots), Scripted(script), TrackSettings(**how), log)), log


def bare(frames):
    "Frames in which a pixel of a spot is not hidden."
    return [f.pts // 100 for f in frames if f.rgb is not None and f.hidden is not None and (f.rgb[~fill_boxes(f.hidden, H, W)].max(initial=0) == 255)]


def seen(spots, at): return [[box(*s) for s in here] if t in at else [] for t, here in enumerate(spots)]


# ---- the promise
boxes = st.lists(st.tuples(st.integers(-10, W), st.integers(-10, H), st.integers(1, 60), st.integers(1, 60)).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])), max_size=4)


@fast
@given(st.lists(boxes, max_size=30), st.floats(0, 1), st.integers(0, 8))
def test_no_frame_shows_what_the_frame_before_hid(script, widen, carry):
    "Whatever a detector says: the box of the frame before, and where its speed leads it, widened, is hidden as long as the track lives."
    tracker = Tracker(TrackSettings(widen, carry, 0))
    for found in script:
        before = [(t.box, t.speed, t.missed) for t in tracker.tracks]
        hidden = fill_boxes(tracker.step(found), 200, 300)
        for old, speed, missed in before:
            alive = missed < carry                       # found again or not, it is in its bound
            for b in (old, move_box(old, speed)):
                if alive: assert not (fill_boxes(widen_boxes(b, widen), 200, 300) & ~hidden).any()
        assert not (fill_boxes(widen_boxes(found, widen), 200, 300) & ~hidden).any()
        assert all(t.missed <= carry for t in tracker.tracks)


@pytest.mark.parametrize("step", (-3, 0, 1, 4))
@pytest.mark.parametrize("gap", range(13))
def test_misses_of_every_length(gap, step):
    "Found twice, missed `gap` times, found again: nothing is seen up to the bound."
    spots = [[(70 + step * (t - 6), 20)] for t in range(gap + 10)]
    at = {2, 3, *range(gap + 4, gap + 10)}
    frames, log = track(spots, seen(spots, at), carry=12, ahead=2)
    assert bare(frames) == [] and log.frames == len(spots) and log.whole == 0


def test_behind_the_bound_the_whole_frame_is_changed_and_nothing_is_carried():
    spots = [[(2 * t, 20)] for t in range(60)]
    frames, log = track(spots, seen(spots, {5, 6, 40, 41}), carry=8, ahead=3)
    assert bare(frames) == []
    assert [f.pts // 100 for f in frames if f.hidden is None] == [0, 1, *range(15, 37), *range(50, 60)]     # 5 - 3, 6 + 8, 40 - 3, 41 + 8
    assert log.remarks() == ["nobody found in 34 of 60 frames, these are changed everywhere"]


def test_who_enters_and_leaves():
    "A spot comes in, is found late, goes out and is followed a little; the memory of it goes."
    spots = [[(3 * t - 20, 30)] if 5 <= t < 50 else [] for t in range(90)]
    frames, log = track(spots, seen(spots, range(9, 50)), carry=10, ahead=4)
    assert bare(frames) == []
    assert [f.pts // 100 for f in frames if f.hidden is None] == [*range(5), *range(60, 90)]
    tracker = Tracker(TrackSettings(carry=3))
    for t in range(5): tracker.step([box(10 * t, 10)])
    for t in range(4): tracker.step([])
    assert not tracker.tracks


def test_two_who_cross_while_neither_is_found():
    spots = [[(2 * t, 30), (120 - 2 * t, 30)] for t in range(60)]
    frames, _ = track(spots, seen(spots, [*range(25), *range(36, 60)]), carry=12, ahead=2)
    assert bare(frames) == []


def test_one_of_two_is_missed():
    "The one who is found does not take the other's track."
    spots = [[(20 + t, 10), (20 + t, 45)] for t in range(40)]
    script = [[box(*spots[t][0])] + ([box(*spots[t][1])] if not 15 <= t < 25 else []) for t in range(40)]
    frames, log = track(spots, script, carry=12, ahead=0)
    assert bare(frames) == [] and log.whole == 0


def test_a_cut_ends_a_track():
    "After a cut nothing is carried, before it nothing is looked back to; without the cut both would be."
    grounds = [40] * 10 + [220] * 10
    def frames_of(grounds):
        for t, ground in enumerate(grounds):
            rgb = draw(ground=ground); rgb[-1, 0] = t, 0, 0
            yield Frame(rgb, t, 1, INFO)
    script = [[box(10, 10)] if t < 10 else [box(100, 40)] for t in range(20)]
    def hidden(grounds): return [(bool(m[10:20, 10:20].all()), bool(m[40:50, 100:110].all())) for m in (fill_boxes(f.hidden, H, W) for f in region_stage(frames_of(grounds), Scripted(script), TrackSettings(), RegionLog()))]
    assert hidden(grounds) == [(True, False)] * 10 + [(False, True)] * 10
    assert hidden([40] * 20)[8:12] == [(True, True)] * 4


@pytest.mark.parametrize("ahead", (0, 1, 4, 100))
def test_order_times_and_packets_stay(ahead):
    draw_one = random.Random(ahead)
    film = list(film_of([None if draw_one.random() < .2 else [(9, 9)] for _ in range(50)]))
    items = [x for f in film for x in (f, *(SimpleNamespace(n=f.pts, k=k) for k in range(draw_one.randrange(3))))]
    held, out = 0, []
    def count():
        nonlocal held
        for item in items: held += 1; yield item
    for item in region_stage(count(), lambda rgb: [box(9, 9)], TrackSettings(ahead=ahead), RegionLog()):
        out.append(item)
        assert sum(isinstance(i, Frame) for i in items[:held]) - sum(isinstance(i, Frame) for i in out) <= ahead, "no more than `ahead` frames wait"
    assert [(type(i), getattr(i, "pts", None), getattr(i, "k", None)) for i in out] == [(type(i), getattr(i, "pts", None), getattr(i, "k", None)) for i in items]
    assert all(a.rgb is b.rgb for a, b in zip(out, items) if isinstance(a, Frame))


@pytest.mark.parametrize("answer", (None, "boxes", [(1, 2, 3)], [(0, 0, np.nan, 3)], [(0, 0, np.inf, 3)], RuntimeError("lens cap"), MemoryError()))
def test_a_detector_that_breaks_means_the_whole_frame(answer):
    def detect(rgb):
        if isinstance(answer, Exception): raise answer
        return answer
    log = RegionLog()
    frames = list(region_stage(film_of([[(9, 9)]] * 5), detect, TrackSettings(), log))
    assert [f.hidden for f in frames] == [None] * 5 and log.whole == 5 and sum(log.errors.values()) == 5


@pytest.mark.parametrize("found", ([(500, 500, 600, 600)], [(-50, -50, -20, -20)], [(5, 5, 5, 5)], [(30, 30, 10, 10)]))
def test_boxes_with_nothing_in_them_are_nobody(found):
    frames = list(region_stage(film_of([[(9, 9)]] * 3), lambda rgb: found, TrackSettings(widen=0), RegionLog()))
    assert [f.hidden for f in frames] == [None] * 3


def test_speed_is_bounded_and_growth_too():
    "A box that jumps far is another one; an unseen one grows by a twentieth in every frame."
    tracker = Tracker(TrackSettings(widen=0, carry=50))
    tracker.step([(0, 0, 10, 10)]); tracker.step([(8, 0, 18, 10)])
    assert np.abs(tracker.tracks[0].speed).max() <= 5
    for _ in range(12): tracker.step([])
    side = tracker.tracks[0].box[2:] - tracker.tracks[0].box[:2]
    assert np.allclose(side, 10 * (1 + 2 * GROWTH) ** 12)


# ---- through the whole machine
def written(path, spots, ground=40):
    writer = VideoWriter(path, path.suffix, INFO, crf=8)
    for t, frame in enumerate(film_of(spots, ground)): writer.write(Frame(frame.rgb, t, 1, INFO))
    writer.close()
    return path


def white(rgb): return int((rgb.min(-1) > 160).sum())


def bright_boxes(rgb):
    at = np.argwhere(rgb[:-4].min(-1) > 160)
    return [(*at.min(0)[::-1], *(at.max(0)[::-1] + 1))] if len(at) > 20 else []


def test_a_film_in_which_the_detector_blinks(tmp_path):
    "Every fourth frame is seen; no output frame shows the spot, all else stays, and the times too."
    spots = [[(2 * t, 30)] for t in range(70)]
    source, calls = written(tmp_path/"in.mp4", spots), []
    def detect(rgb):
        calls.append(1)
        return bright_boxes(rgb) if len(calls) % 4 == 1 else []
    model = FrameAnonymizer(np.zeros_like, "black", detect=detect)
    entry = anonymize_file(source, tmp_path/"out.mp4", model, Options(regions=TrackSettings(carry=12, ahead=4)))
    assert (entry["status"], entry["frames_out"], entry["notes"], len(calls)) == ("done", 70, [], 70)
    raw, out = list(decode_frames(source)), list(decode_frames(tmp_path/"out.mp4"))
    assert [f.pts * f.info.time_base for f in out] == [f.pts * f.info.time_base for f in raw]
    assert max(white(f.rgb[:-4]) for f in out) == 0 < min(white(f.rgb) for f in raw[:60])
    kept = [np.abs(f.rgb[:, 130:].astype(int) - g.rgb[:, 130:]).mean() for f, g in zip(out[:40], raw[:40])]
    assert max(kept) < 6, "outside of the boxes nothing is changed"
    assert entry["stage_seconds"]["detect"] > 0


def test_without_the_tracker_the_same_film_shows_the_spot(tmp_path):
    "What the test above would miss if it could not fail."
    spots, calls = [[(2 * t, 30)] for t in range(30)], []
    def detect(rgb):
        calls.append(1)
        return bright_boxes(rgb) + [(0, 0, 4, 4)] if len(calls) % 4 == 1 else [(0, 0, 4, 4)]       # somebody else is always found
    model = FrameAnonymizer(np.zeros_like, "black", detect=detect)
    for carry, ahead, shown in ((0, 0, True), (12, 4, False)):
        calls.clear()
        anonymize_file(written(tmp_path/"in.mp4", spots), tmp_path/"out.mp4", model, Options(force=True, regions=TrackSettings(.2, carry, ahead)))
        assert any(white(f.rgb[:-4]) for f in decode_frames(tmp_path/"out.mp4")) == shown


def test_frames_that_the_model_breaks_on_are_black_and_not_raw_outside(tmp_path):
    calls = []
    def run(frames):
        calls.append(1)
        if len(calls) % 5 == 2: raise RuntimeError("wrong weights")
        return np.zeros_like(frames)
    model = FrameAnonymizer(run, "sometimes", detect=lambda rgb: [(0, 0, 20, 20)])
    source = written(tmp_path/"in.mkv", [[(60, 30)]] * 10)
    entry = anonymize_file(source, tmp_path/"out.mkv", model, Options(batch=1))
    out = [f.rgb for f in decode_frames(tmp_path/"out.mkv")]
    assert entry["blank"] == sum(rgb.max() < 20 for rgb in out) == 2 and sum(white(rgb) > 60 for rgb in out) == 8


def test_sound_stays_in_step_with_frames_that_wait(tmp_path):
    with av.open(str(tmp_path/"in.mp4"), "w") as video:
        stream, voice = video.add_stream("libx264", rate=25, width=W, height=H, pix_fmt="yuv420p"), video.add_stream("aac", rate=16000)
        for t in range(30): video.mux(stream.encode(av.VideoFrame.from_ndarray(draw((3 * t, 20)), format="rgb24")))
        video.mux(stream.encode())
        beep = av.AudioFrame.from_ndarray((np.sin(np.arange(19200) / 9) * 9000).astype(np.int16)[None], format="s16", layout="mono")
        beep.sample_rate = 16000
        video.mux(voice.encode(av.AudioResampler("fltp", "stereo", 16000).resample(beep)[0])); video.mux(voice.encode())
    model = FrameAnonymizer(np.zeros_like, "black", detect=bright_boxes)
    entry = anonymize_file(tmp_path/"in.mp4", tmp_path/"out.mp4", model, Options(keep_audio=True, regions=TrackSettings(ahead=9)))
    def packets(path):
        with av.open(str(path)) as video: return [round(float(p.pts * p.time_base), 3) for p in video.demux(audio=0) if p.size]
    assert entry["status"] == "done" and packets(tmp_path/"out.mp4") == packets(tmp_path/"in.mp4")


def test_images_and_previews(tmp_path):
    save_image(tmp_path/"in.png", ".png", draw((60, 30), ground=90))
    model = FrameAnonymizer(np.zeros_like, "black", detect=bright_boxes)
    entry = anonymize_file(tmp_path/"in.png", tmp_path/"out.png", model, Options(height=36))
    out = load_image(tmp_path/"out.png")
    assert entry["status"] == "done" and out[30:42, 60:72].max() == 0 and (out[:20] == 90).all()
    blind = FrameAnonymizer(np.zeros_like, "black", detect=lambda rgb: [])
    entry = anonymize_file(tmp_path/"in.png", tmp_path/"all.png", blind, Options())
    assert load_image(tmp_path/"all.png").max() == 0 and entry["notes"] == ["nobody found in 1 of 1 frames, these are changed everywhere"]
    side = load_image(write_preview(tmp_path/"in.png", tmp_path/"look.png", model))
    assert (side[:, :W] == draw((60, 30), ground=90)).all() and side[30:42, W + 60:W + 72].max() == 0 and (side[:20, W:] == 90).all()


# ---- the command
def onnx_file(path, rows=None, maps=None):
    "A detector that answers with fixed rows, or with maps."
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    values = [np.array([rows], np.float32)] if maps is None else maps
    info = lambda name, dims: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
    nodes = [onnx.helper.make_node("Constant", [], [f"y{i}"], value=onnx.numpy_helper.from_array(v)) for i, v in enumerate(values)]
    graph = onnx.helper.make_graph(nodes, "toy", [info("x", [1, 3, 64, 64])], [info(f"y{i}", v.shape) for i, v in enumerate(values)])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.fixture
def call(command, tmp_path, monkeypatch):
    "The command of a user who has fetched no weights."
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"weights"))
    return command


def test_the_command_hides_what_a_file_finds(tmp_path, call):
    onnx_file(tmp_path/"left.onnx", [(0, 0, 16, 64, .9, 0)])
    written(tmp_path/"in.mp4", [[(120, 30)]] * 12)
    code, out, err = call("in.mp4", "--model", "blackening@left.onnx", "--widen", 0, "--carry", 0, "--ahead", 0, "--crf", 8)
    assert (code, err) == (0, ""), err
    assert "12 frames with blackening (left.onnx)" in out
    frames = [f.rgb for f in decode_frames(tmp_path/"in-anonymized.mp4")]
    assert max(f[:, :34].max() for f in frames) < 20 and min(white(f[:-4, 60:]) for f in frames) > 60
    report = json.loads((tmp_path/"in-anonymized.mp4.report.json").read_text())
    assert report["model"]["name"] == "blackening@left.onnx" and len(report["model"]["card"]["detector_sha256"]) == 64
    assert report["options"]["regions"] == dict(widen=0, carry=0, ahead=0) and report["stage_fps"]["detect"]


def test_words_stand_for_files_in_the_cache(tmp_path, call):
    heat = [np.zeros((1, n, 16, 16), np.float32) for n in (1, 2, 2, 10)]
    heat[0][0, 0, 2, 3] = .9
    onnx_file(tmp_path/"weights/centerface/centerface.onnx", maps=heat)
    onnx_file(tmp_path/"weights/persons/persons.onnx", [(0, 0, 16, 64, .9, 0)])
    written(tmp_path/"in.mp4", [[(120, 30)]] * 3)
    for word in ("faces", "persons"):
        code, out, err = call("in.mp4", f"{word}.mp4", "--model", f"pixelate@{word}")
        assert code == 0 and not err and f"3 frames with pixelate ({word})" in out, err


@pytest.mark.parametrize("args,code,words", [
    (("--model", "blur-strong@faces"), 1, "penaltyanon weights fetch centerface"), (("--model", "blur-strong@persons"), 1, "penaltyanon weights fetch persons"),
    (("--model", "blur-strong@face"), 2, "did you mean 'faces'"), (("--model", "blur-strong@none.onnx"), 1, "none.onnx: no such file"),
    (("--model", "blur-strong@wide.onnx"), 1, "wide.onnx: does not map one frame to (1, m, 6) boxes"), (("--model", "blur-strong@text.onnx"), 1, "not a readable ONNX file"),
    (("--model", "blurstrong@faces"), 2, "did you mean 'blur-strong'"), (("--model", "raw@faces"), 1, "nearly the identity"),
    (("--widen", -0.1), 2, "widen: -0.1 is not from 0 to 2"), (("--carry", -1), 2, "carry: -1 is not from 0"), (("--ahead", 101), 2, "ahead: 101 is not from 0 to 100"), (("--widen", "nan"), 2, "widen: nan is not from 0")])
def test_what_cannot_be_meant_is_one_line_before_any_work(tmp_path, call, args, code, words):
    written(tmp_path/"in.mp4", [[(9, 9)]] * 2)
    onnx_file(tmp_path/"wide.onnx", [(1, 2, 3)])
    (tmp_path/"text.onnx").write_text("hello")
    before = sorted(p.name for p in tmp_path.iterdir())
    got, out, err = call("in.mp4", *args)
    assert got == code and words in err and err.count("\n") == 1 and err.startswith("error: "), err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_another_file_under_the_name_of_centerface_is_one_line(tmp_path, call):
    onnx_file(tmp_path/"weights/centerface/centerface.onnx", [(1, 2, 3, 4, .9, 0)])
    written(tmp_path/"in.mp4", [[(9, 9)]] * 2)
    code, out, err = call("in.mp4", "--model", "blur-strong@faces")
    assert code == 1 and "centerface.onnx: is not CenterFace" in err and err.count("\n") == 1


def test_regions_need_no_pytorch(tmp_path):
    onnx_file(tmp_path/"left.onnx", [(0, 0, 16, 64, .9, 0)])
    written(tmp_path/"in.mp4", [[(9, 9)]] * 3)
    code = "import sys; from penaltyanon.edge.command import anonymize; print(anonymize('in.mp4', 'out.mp4', 'blur-strong@left.onnx')['ok'], [m for m in sys.modules if m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "True []\n", done.stderr


def test_the_same_words_for_tensors(tmp_path, monkeypatch):
    import torch
    from penaltyanon.nets.obfuscation import open_obfuscation
    monkeypatch.setenv("PENALTYANON_WEIGHTS", str(tmp_path/"weights"))
    with pytest.raises(UserError, match="penaltyanon weights fetch persons"): open_obfuscation("blackening@persons")
    onnx_file(tmp_path/"weights/persons/persons.onnx", [(0, 0, 16, 64, .9, 0)])
    f_A, x = open_obfuscation("blackening@persons"), torch.rand(2, 3, 64, 64)
    assert f_A(x)[..., :16].max() == 0 and torch.equal(f_A(x)[..., 16:], x[..., 16:]) and f_A.label == "blackening (persons, 0 of 4 frames full-frame)"


# ---- the real ones
def weights_or_skip(name):
    path = cache_folder("weights")/name/f"{name}.onnx"
    if not path.is_file(): pytest.skip(f"{path} is not there; `penaltyanon weights fetch {name}`")
    if not (SHARED/"ucf101-mini").is_dir(): pytest.skip(f"no real clips under {SHARED}; set PENALTYANON_SHARED")


@pytest.mark.parametrize("word,file,frame,true", [("faces", "ApplyEyeMakeup/v_ApplyEyeMakeup_g07_c02.avi", 134, (79, 59, 122, 118)), ("persons", "BaseballPitch/v_BaseballPitch_g01_c02.avi", 73, (103, 44, 170, 163))])
def test_a_real_detector_finds_an_easy_one(word, file, frame, true):
    weights_or_skip("centerface" if word == "faces" else word)
    rgb = list(decode_frames(SHARED/"ucf101-mini/UCF-101"/file))[frame].rgb
    assert box_overlaps(open_detector(word)(rgb), as_boxes(true)).max() > .5
