"Reading: the frames asked for and no others, from every kind of file; damage is found, real clips are not mistaken for it."
import csv, os, random, subprocess, sys, wave
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from conftest import SHARED
from penaltyanon.data import video
from penaltyanon.core.files import UserError
from penaltyanon.data.video import VideoError, frame_count, read_frames, read_image, sample_indices, write_video

real = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason=f"no real clips under {SHARED}; set PENALTYANON_SHARED")
KINDS = {"mpeg4.avi": dict(codec="mpeg4", g=12), "mpeg4-b.avi": dict(codec="mpeg4", bf=2, g=30), "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
         "h264.mp4": dict(codec="libx264", bf=3, g=25), "h264-b.avi": dict(codec="libx264", bf=3, g=25), "h264-p.avi": dict(codec="libx264", bf=0, g=25),
         "open-gop.mkv": {"codec": "libx264", "bf": 3, "g": 25, "x264-params": "open-gop=1"}, "vp9.webm": dict(codec="libvpx-vp9", g=40)}
N = 120


def numbered(n=N, h=48, w=96):
    "Frame i shows the number i as eight bars."
    bits = torch.arange(n)[:, None] >> torch.arange(8) & 1
    return (40 + 180 * bits).to(torch.uint8).repeat_interleave(w // 8, 1)[:, None, None, :].expand(n, 3, h, w).contiguous()


def number(frames):
    bars = frames.float().mean((1, 2)).unflatten(-1, (8, -1)).mean(-1) > 128
    return (bars.int() << torch.arange(8)).sum(-1).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    return {name: write_video(folder/name, numbered(), **how) for name, how in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=15, deadline=None)
@given(asked=st.lists(st.integers(0, N - 1), min_size=1, max_size=20))
def test_frames_are_those_asked_for(files, name, asked):
    "Any order, repetitions, with and without permission to jump."
    assert number(read_frames(files[name], asked)) == asked
    assert number(read_frames(files[name], asked, count=N)) == asked


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_counted(files, name): assert frame_count(files[name]) == N


def jumped(path, wanted, count):
    with video.open_video(path) as (v, s): return video._decode_seeking(v, s, wanted, video._rgb_converter(None), count)


def test_importing_the_reader_does_not_import_pytorch():
    "The command reads videos on devices that have none."
    code = "import sys, penaltyanon.data.video; print([m for m in sys.modules if m.startswith(('torch', 'einops'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_cover_is_not_the_video(tmp_path):
    "A cover image is stored as a stream of its own; frames come from the other one."
    av = video.av
    with av.open(str(tmp_path/"a.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1, width=32, height=32, pix_fmt="yuvj420p")
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("mpeg4", rate=25, width=96, height=48, pix_fmt="yuv420p")
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")))
        container.mux(cover.encode())
        for frame in numbered(9): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path/"a.mp4")) as container: assert len(container.streams.video) == 2
    assert frame_count(tmp_path/"a.mp4") == 9 and number(read_frames(tmp_path/"a.mp4", [0, 8])) == [0, 8]


def test_jumps_only_where_time_stamps_can_be_trusted(files):
    assert {name for name, path in files.items() if not jumped(path, {100, 103}, N)} == {"h264-b.avi"}
    assert not jumped(files["h264.mp4"], {100}, N - 1)      # a frame that does not decode: every later number would be off by one


def test_a_wrong_count_is_no_wrong_frame(files):
    for name, path in files.items():
        for count in N - 3, N + 3: assert number(read_frames(path, [7, 99], count=count)) == [7, 99], name


def test_unexpected_times_stop_a_jump():
    class Frame:
        def __init__(self, pts): self.pts = pts
    number = {10 * i: i for i in range(8)}
    follow = lambda *times, first=3: [i for i, _ in video._trusted_frames(map(Frame, times), number, first)]
    assert follow(20, 30, 40) == [2, 3, 4]
    assert follow(20, 40, 50) == [2] == follow(20, 20, 30) and follow(20, 30, 35) == [2, 3]
    assert follow(50, 60) == [] == follow(None) == follow(5)       # landed behind the wanted frame, or nowhere


@settings(max_examples=150, deadline=None)
@given(part=st.floats(0.0, 1.0), kind=st.sampled_from(["avi", "mp4", "mkv"]))
def test_a_cut_file_is_refused_or_whole(tmp_path_factory, part, kind):
    "Wherever it is cut: an error that names the file, or at least 98 % of the frames (the cut took the index only)."
    folder = tmp_path_factory.mktemp("cut")
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 3, 32, 32), dtype=np.uint8))
    path = write_video(folder/f"a.{kind}", noise, codec="mpeg4", g=10)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    try: assert frame_count(path) >= 49
    except VideoError as e: assert str(path) in str(e) and "\n" not in str(e)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 400), frames=st.integers(1, 32), skip=st.integers(1, 8), seed=st.integers(0, 9), views=st.integers(1, 7))
def test_sampled_indices(n, frames, skip, seed, views):
    every = [sample_indices(n, frames, skip, rng=torch.Generator().manual_seed(seed))] + [sample_indices(n, frames, skip, view=v, views=views) for v in range(views)]
    span = skip * (frames - 1)
    for clip in every:
        assert len(clip) == frames and all(0 <= i < n for i in clip)
        assert all((b - a) % n == skip % n for a, b in zip(clip, clip[1:]))
        if n > span: assert clip[-1] - clip[0] == span                      # no loop where it fits
        else: assert clip[0] == 0                                           # a loop from the start where it does not
    starts = [clip[0] for clip in every[1:]]
    assert starts == sorted(starts) and starts[0] == 0
    if views > 1: assert starts[-1] == max(0, n - 1 - span)


def test_colours_are_rgb_and_bytes_are_reproducible(tmp_path):
    for channel in range(3):
        plain = torch.full((4, 3, 32, 48), 30, dtype=torch.uint8); plain[:, channel] = 200
        path = write_video(tmp_path/"c.avi", plain)
        assert (read_frames(path, [0, 3]).float() - plain[:2].float()).abs().max() < 8
    once = path.read_bytes()
    assert write_video(path, plain).read_bytes() == once == write_video(tmp_path/"d.avi", plain).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.avi", "d.avi"]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_what_is_read_is_what_was_written(tmp_path, codec):
    "And as well at the end as at the start: the default rate control of MPEG-4 loses a still picture after a second."
    smooth = torch.from_numpy(np.random.default_rng(0).integers(60, 200, (1, 3, 5, 7), dtype=np.uint8)).float()
    still = torch.nn.functional.interpolate(smooth, (64, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
    frames = still.expand(100, -1, -1, -1).clone(); frames[:, :, 10:26, 20:36] = 220
    back = read_frames(write_video(tmp_path/"a.avi", frames, codec=codec), range(100)).float()
    error = (back - frames.float()).abs().mean((1, 2, 3))
    assert error.max() < 4 and (error - error[0]).abs().max() < 0.7


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_video(tmp_path/"a.avi", numbered(5)); old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="a.avi: cannot be written .disk full"): write_video(path, numbered(9))
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_scaling_never_enlarges(files):
    assert read_frames(files["h264.mp4"], [3], short_side=24).shape == (1, 3, 24, 48)
    assert read_frames(files["h264.mp4"], [3], short_side=4800).shape == (1, 3, 48, 96)


def test_errors_name_the_file_and_the_way_out(tmp_path, files):
    (tmp_path/"empty.avi").touch(); (tmp_path/"text.mp4").write_text("hello" * 1000)
    sound = tmp_path/"sound.wav"
    with wave.open(str(sound), "wb") as w: w.setnchannels(1); w.setsampwidth(2); w.setframerate(8000); w.writeframes(bytes(16000))
    for bad, why in ((tmp_path/"empty.avi", "fetch the file again"), (tmp_path/"text.mp4", "fetch the file again"), (tmp_path/"none.avi", "No such file"), (sound, "no video stream"), (tmp_path, "fetch the file again")):
        for read in frame_count, lambda p: read_frames(p, [0]):
            with pytest.raises(VideoError, match=why) as e: read(bad)
            assert str(bad) in str(e.value) and "\n" not in str(e.value)
    for indices in [], [-1], [N]:
        with pytest.raises(UserError, match="h264.mp4"): read_frames(files["h264.mp4"], indices)
    with pytest.raises(VideoError, match="damaged image"): read_image(tmp_path/"text.mp4")


def test_images_stand_upright(tmp_path):
    from PIL import Image
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8)); exif = image.getexif(); exif[0x0112] = 6      # camera held sideways
    image.save(tmp_path/"a.jpg", exif=exif); image.convert("L").save(tmp_path/"grey.png")
    assert read_image(tmp_path/"a.jpg").shape == (3, 40, 20) and read_image(tmp_path/"grey.png").shape == (3, 20, 40)
    assert read_image(tmp_path/"a.jpg", 10).shape == (3, 20, 10)


def real_clips(folder, sub):
    return [(SHARED/folder/sub/r["file"], int(r["frames_decoded"]), int(r["frames_declared"])) for r in csv.DictReader(open(SHARED/folder/"clips.csv"))]


@real
@pytest.mark.parametrize("folder,sub,n", [("ucf101-mini", "UCF-101", 298), ("hmdb51-mini", "hmdb51_org", 149)])
def test_all_real_clips_are_accepted_and_counted(folder, sub, n):
    "Also those whose header promises more frames than there are."
    clips = real_clips(folder, sub)
    assert len(clips) == n and any(declared > frames for _, frames, declared in clips)
    assert [frame_count(p) for p, *_ in clips] == [frames for _, frames, _ in clips]


@real
def test_jumping_in_real_clips_changes_nothing():
    clips = real_clips("ucf101-mini", "UCF-101")
    odd, rng = [c for c in clips if c[1] != c[2]], random.Random(0)
    assert len(odd) == 10
    for path, frames, _ in odd + rng.sample(clips, 20):
        asked = [rng.randrange(frames) for _ in range(3)]
        assert torch.equal(read_frames(path, asked, 60), read_frames(path, asked, 60, count=frames)), path


@real
def test_a_cut_real_clip_is_refused(tmp_path):
    for path, frames, _ in real_clips("ucf101-mini", "UCF-101")[::60]:
        for part in 0.2, 0.6, 0.9:
            (tmp_path/"cut.avi").write_bytes(path.read_bytes()[:int(path.stat().st_size * part)])
            with pytest.raises(VideoError, match="cut.avi"): frame_count(tmp_path/"cut.avi")
