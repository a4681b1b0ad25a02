"Files in, files out: every frame at its moment, nothing else, and never a raw one, whatever breaks."
import csv, json, os, shutil, signal, subprocess, sys, threading, time
from fractions import Fraction
from pathlib import Path
import av, numpy as np, pytest
from PIL import Image
from conftest import SHARED
from penaltyanon import cli
from penaltyanon.edge import anonymize as one, command, guards, streams
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.core.files import UserError, file_hash
from penaltyanon.edge.guards import FrameAnonymizer
from penaltyanon.edge.streams import decode_frames

real = pytest.mark.skipif(not (SHARED/"ucf101-mini").is_dir(), reason=f"no real clips under {SHARED}; set PENALTYANON_SHARED")
N = 12
FLAT = FrameAnonymizer(lambda f: np.full_like(f, 128), "flat")           # whatever has structure did not come from here
NEGATIVE = FrameAnonymizer(lambda f: 255 - f, "negative")


def numbered(n=N, h=32, w=48):
    "Frame i shows i as six bars, with a texture that any leak would show."
    noise = np.random.default_rng(7).integers(-30, 30, (h, w, 1))
    bars = [np.repeat(40 + 180 * ((i >> np.arange(6)) & 1), w // 6) for i in range(n)]
    return [np.clip(np.pad(b, (0, w - len(b)))[None, :, None] + noise + np.zeros((1, 1, 3)), 0, 255).astype(np.uint8) for b in bars]


def number(rgb):
    width = rgb.shape[1] // 6
    return int(((rgb[:, :6 * width].mean((0, 2)).reshape(6, width).mean(1) > 128) << np.arange(6)).sum())


def film(path, frames=None, codec="libx264", moments=None, tick=Fraction(1, 90000), rotation=None, sound=False, options=None, tags=None, **more):
    frames = numbered() if frames is None else frames
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=25, width=frames[0].shape[1], height=frames[0].shape[0], options=options or {})
        for k, v in {"pix_fmt": "yuv420p", **more}.items(): setattr(stream, k, v)
        if moments: stream.codec_context.time_base = tick
        if rotation is not None: stream.set_display_rotation(rotation)
        video.metadata.update(tags or {})
        if sound: voice = video.add_stream("aac", rate=16000)
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if moments: frame.pts, frame.time_base = moments[i], tick
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
        if sound:
            beep = av.AudioFrame.from_ndarray((np.sin(np.arange(16000) / 9) * 9000).astype(np.int16)[None].repeat(1, 0), format="s16", layout="mono")
            beep.sample_rate = 16000
            video.mux(voice.encode(av.AudioResampler("fltp", "stereo", 16000).resample(beep)[0])); video.mux(voice.encode())
    return path


def pictures(path): return [p.rgb for p in decode_frames(path)]
def seconds(path):
    found = list(decode_frames(path))
    return [float((p.pts - p.info.origin) * p.info.time_base) for p in found], float(found[-1].duration * found[-1].info.time_base)
def leftovers(folder): return [p.name for p in folder.iterdir() if p.name.startswith(".")]
def run(source, target, model=NEGATIVE, **how): return anonymize_file(source, target, model, Options(**how))


def is_flat(path):
    "Every picture of the output is one colour: grey, or black."
    shown = pictures(path)
    return all(p is not None and p.std() < 3 for p in shown) and len(shown)


# ---- what must be kept
INPUTS = {"h264.mp4": dict(options={"bf": "3"}), "h264.avi": dict(options={"bf": "3"}), "hevc.mkv": dict(codec="libx265", options={"x265-params": "log-level=none"}), "ten.mp4": dict(codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": "log-level=none"}),
          "vp9.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}), "xvid.avi": dict(codec="mpeg4", options={"bf": "2"}), "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"), "grey.mkv": dict(codec="ffv1", pix_fmt="gray"),
          "ts.ts": {}, "open.mkv": {"options": {"x264-params": "open-gop=1", "g": "4", "bf": "3"}}, "mov.mov": dict(codec="mpeg4")}


@pytest.mark.parametrize("name", INPUTS)
def test_every_frame_at_its_moment(tmp_path, name):
    "Whatever the codec: the frames in their order, each at its time."
    source = film(tmp_path/name, numbered(24, 64, 96), **INPUTS[name])
    target = tmp_path/f"out{'.mp4' if name.endswith('.ts') else source.suffix}"
    entry = run(source, target)
    assert (entry["status"], entry["frames_in"], entry["frames_out"], entry["blank"]) == ("done", 24, 24, 0), entry
    assert [number(255 - p) for p in pictures(target)] == list(range(24))
    (before, last), (after, end) = seconds(source), seconds(target)
    assert np.abs(np.subtract(before, after)).max() < 1.1e-3 and abs(last - end) < 0.02, (before, after)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_uneven_times_stay(tmp_path, suffix):
    moments = [90 * t for t in (0, 10, 43, 44, 90, 91, 120, 400, 401, 800, 805, 1500)]
    source = film(tmp_path/f"in{suffix}", moments=moments)
    run(source, tmp_path/f"out{suffix}")
    assert seconds(source) == seconds(tmp_path/f"out{suffix}")
    assert [number(255 - p) for p in pictures(tmp_path/f"out{suffix}")] == list(range(N))


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_upright_and_in_shape(tmp_path, rotation, suffix):
    "Turned, with oblong pixels: shown the same; the model sees people upright."
    page = np.full((32, 48, 3), 60, np.uint8); page[:16, :24] = 220
    source, seen = film(tmp_path/"in.mp4", [page] * 3, rotation=rotation, sample_aspect_ratio=Fraction(4, 3)), []
    entry = run(source, tmp_path/f"out{suffix}", FrameAnonymizer(lambda f: (seen.append(f[0].copy()), 255 - f)[1]))
    assert entry["status"] == "done", entry
    expected = np.rot90(page, rotation // 90)
    assert np.abs(seen[0].astype(int) - expected).mean() < 4
    shown = next(decode_frames(tmp_path/f"out{suffix}"))
    assert np.abs(255 - shown.rgb.astype(int) - expected).mean() < 5
    quarter = rotation in (90, -90) and suffix == ".avi"       # AVI holds no rotation: stored upright
    assert shown.info.aspect == (Fraction(3, 4) if quarter else Fraction(4, 3))
    if suffix != ".avi": assert shown.info.matrix == next(decode_frames(source)).info.matrix


@pytest.mark.parametrize("size", [(33, 47), (1, 1), (17, 64), (64, 15)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv"])
def test_odd_sizes(tmp_path, size, suffix):
    h, w = size
    source = film(tmp_path/"in.mkv", [np.full((h, w, 3), 90, np.uint8)] * 3, codec="ffv1", pix_fmt="yuv444p")
    entry = run(source, tmp_path/f"out{suffix}")
    even = (h, w) if suffix == ".webm" else (h + h % 2, w + w % 2)          # H.264 that players show needs even numbers
    assert entry["status"] == "done" and pictures(tmp_path/f"out{suffix}")[0].shape == (*even, 3), entry
    assert (even == size) != any("needs even numbers" in note for note in entry["notes"]), entry


@pytest.mark.parametrize("how", [dict(), dict(color_range=2), dict(color_range=1, colorspace=1, color_primaries=1, color_trc=1), dict(color_range=2, colorspace=1)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_colours_keep_range_and_matrix(tmp_path, how, suffix):
    colours = np.zeros((32, 48, 3), np.uint8); colours[:, :16, 0] = 200; colours[:, 16:32, 1] = 200; colours[:, 32:] = np.linspace(0, 255, 16, dtype=np.uint8)[None, :, None]
    source = film(tmp_path/"in.mkv", [colours] * 2, **how, options={"crf": "5"})
    out = tmp_path/f"out{suffix}"
    assert run(source, out, crf=5)["status"] == "done"
    a, b = next(decode_frames(source)), next(decode_frames(out))
    assert np.abs(255 - b.rgb.astype(int) - a.rgb).mean() < 6
    assert (b.info.color[0] == 2) == (a.info.color[0] == 2) and (b.info.color[1] == 1) == (a.info.color[1] == 1)


def test_the_output_keeps_its_size_at_any_height(tmp_path):
    source, seen = film(tmp_path/"in.mp4"), []
    run(source, tmp_path/"out.mp4", FrameAnonymizer(lambda f: (seen.append(f.shape[1:3]), 255 - f)[1]), height=16)
    assert set(seen) == {(16, 24)} and pictures(tmp_path/"out.mp4")[0].shape == (32, 48, 3)


def test_a_cut_file_says_so(tmp_path):
    "Also where the container says how long it is, and the stream does not."
    for name, how in {"in.mkv": {}, "in.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}), "in.avi": dict(codec="mjpeg", pix_fmt="yuvj420p")}.items():
        source, out = film(tmp_path/name, numbered(50, 64, 96), **how), tmp_path/f"out-{name}"
        assert run(source, out)["status"] == "done", name
        source.write_bytes(source.read_bytes()[:source.stat().st_size // 2])
        entry = run(source, out, force=True)
        assert entry["status"] == "truncated" and "truncated, ends at" in entry["notes"][-1] and 5 < entry["frames_out"] < 45, entry


# ---- what must be dropped
def test_nothing_but_pictures_survives(tmp_path):
    "Sound, subtitles, attachments, tags, place: none of them, unless sound is asked for."
    secret = dict(title="Anna at home", location="+52.5200+013.4050/", comment="GPS 52.52")
    for name in "in.mp4", "in.mkv":
        source = film(tmp_path/name, sound=True, tags=secret)
        with av.open(str(source)) as video: assert video.streams.audio and "title" in {k.lower() for k in video.metadata}
        for keep in False, True:
            out = tmp_path/f"{keep}{source.suffix}"
            assert run(source, out, keep_audio=keep)["status"] == "done"
            with av.open(str(out)) as video:
                assert [s.type for s in video.streams] == ["video", "audio"][:1 + keep]
                assert not {k.lower() for k in video.metadata} & {"title", "location", "comment", "creation_time"}
                if keep: assert 0.8 < sum(f.samples for f in video.decode(audio=0)) / 16000 < 1.2
            assert b"Anna" not in out.read_bytes() and b"52.5" not in out.read_bytes()
    with av.open(str(tmp_path/"att.mkv"), "w") as video:
        stream = video.add_stream("libx264", rate=25, width=48, height=32)
        video.add_attachment("face.txt", "text/plain", b"Anna's face")
        for f in numbered(): video.mux(stream.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        video.mux(stream.encode())
    assert run(tmp_path/"att.mkv", tmp_path/"out.mkv")["status"] == "done" and b"Anna" in (tmp_path/"att.mkv").read_bytes()
    assert b"Anna" not in (tmp_path/"out.mkv").read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tif"])
def test_photographs(tmp_path, suffix):
    "Upright, without EXIF, without transparency, whatever their mode."
    page = np.full((32, 48, 3), 60, np.uint8); page[:16, :24] = 220
    picture = Image.fromarray(page)
    exif = picture.getexif(); exif[0x0112], exif[0x010E] = 6, "Anna at home"
    picture.save(tmp_path/f"in{suffix}", **({} if suffix == ".bmp" else {"exif": exif}))
    assert run(tmp_path/f"in{suffix}", tmp_path/f"out{suffix}")["status"] == "done"
    out = Image.open(tmp_path/f"out{suffix}")
    upright = page if suffix == ".bmp" else np.rot90(page, -1)
    assert np.abs(255 - np.asarray(out).astype(int) - upright).mean() < 4 and not out.getexif().get(0x010E)
    assert b"Anna" not in (tmp_path/f"out{suffix}").read_bytes()
    for mode in "L", "RGBA", "P", "I;16":
        picture = Image.fromarray(page[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(page)
        (picture.quantize(4) if mode == "P" else picture.convert(mode)).save(tmp_path/"mode.png")
        assert run(tmp_path/"mode.png", tmp_path/f"mode-{mode[0]}.png")["status"] == "done"
        got = np.asarray(Image.open(tmp_path/f"mode-{mode[0]}.png"))
        assert np.abs(255 - got.astype(int) - page).mean() < 8, mode
        (tmp_path/f"mode-{mode[0]}.png").unlink()


# ---- fail closed: an error at every place, at every frame
@pytest.fixture
def standalone(tmp_path): return film(tmp_path/"in.avi", codec="mjpeg", pix_fmt="yuvj420p")


@pytest.mark.parametrize("on_bad", ["blank", "drop", "fail"])
@pytest.mark.parametrize("where", ["decode", "model"])
def test_a_bad_frame_is_black_or_gone(tmp_path, standalone, monkeypatch, where, on_bad):
    good = streams._decode_packet
    for k in range(N):
        def lost(stream, packet, order):
            if packet is not None and packet.pts == k: order.record_error(); return []
            return good(stream, packet, order)
        def moody(frames):
            if where == "model" and any(number(f) == k for f in frames): raise RuntimeError("no idea")
            return np.full_like(frames, 128)
        out = tmp_path/f"{k}.mkv"
        with monkeypatch.context() as m:
            m.setattr(streams, "_decode_packet", lost if where == "decode" else good)
            entry = run(standalone, out, FrameAnonymizer(moody), on_bad_frame=on_bad, batch=5)
        if on_bad == "fail": assert entry["status"] == "failed" and f"frame {k}" in entry["reason"] and not out.exists(), entry
        else:
            assert entry["status"] == "done" and entry["blank" if on_bad == "blank" else "dropped"] == 1, entry
            assert is_flat(out) == N - (on_bad == "drop")
            times = seconds(out)[0]
            if on_bad == "blank":
                assert [i for i, p in enumerate(pictures(out)) if p.mean() < 5] == [k] and np.allclose(times, np.arange(N) / 25, atol=1e-3)
            else: assert np.allclose(times, np.delete(np.arange(N), k) / 25, atol=1e-3)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("where", ["decode", "model", "encode", "mux", "rename", "sync", "count"])
def test_no_output_looks_finished(tmp_path, standalone, monkeypatch, where):
    "An unforeseen error at frame k of each stage (or at the end): no file, no leftovers, one line."
    def bomb(kind, good, when):
        state = {"n": -1}
        def call(*a, **k):
            state["n"] += 1
            if state["n"] == when or (where == "decode" and state["n"] > when): raise kind("lightning")    # a thread that an earlier test left behind must not take it away
            return good(*a, **k)
        return call
    places = dict(decode=(streams, "_upright_rgb"), model=(one, "_anonymize_batch"), encode=(streams.VideoWriter, "write"), mux=(streams.VideoWriter, "_mux"), rename=(guards.os, "replace"), sync=(guards.os, "fsync"), count=(one, "_count_packets"))
    target, name = places[where]
    for kind in (RuntimeError, OSError, MemoryError):
        for k in range(N if where in ("decode", "encode", "mux") else 1):
            with monkeypatch.context() as m:
                m.setattr(target, name, bomb(kind, getattr(target, name), k))
                entry = run(standalone, tmp_path/"out.mp4", FLAT, batch=4)
            assert entry["status"] == "failed" and "lightning" in entry["reason"] and "\n" not in entry["reason"], (kind, k, entry["frames_out"], entry)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["in.avi"], (where, k)
    assert run(standalone, tmp_path/"out.mp4", FLAT)["status"] == "done"


def test_memory_runs_out(tmp_path, standalone):
    "Half the batch, then the CPU, then no output."
    def hungry(limit, calls):
        def go(frames):
            calls.append(len(frames))
            if len(frames) > limit: raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            return np.full_like(frames, 128)
        return go
    calls = []
    entry = run(standalone, tmp_path/"a.mp4", FrameAnonymizer(hungry(2, calls)))
    assert entry["status"] == "done" and max(calls[2:]) == 2 and "batch 2" in entry["notes"][-1] and is_flat(tmp_path/"a.mp4") == N
    entry = run(standalone, tmp_path/"b.mp4", FrameAnonymizer(hungry(0, []), on_cpu=lambda: hungry(9, [])))
    assert entry["status"] == "done" and "CPU" in entry["notes"][-1] and is_flat(tmp_path/"b.mp4") == N
    entry = run(standalone, tmp_path/"c.mp4", FrameAnonymizer(hungry(0, [])))
    assert entry["status"] == "failed" and "--height" in entry["reason"] and not (tmp_path/"c.mp4").exists()


SLOW = """
import sys, time, numpy as np
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.edge.guards import FrameAnonymizer
def slow(f): time.sleep(0.05 * len(f)); return np.full_like(f, 128)
anonymize_file(sys.argv[1], sys.argv[2], FrameAnonymizer(slow), Options(codec="mjpeg"))
"""                 # each picture of MJPEG is large and whole, so the file grows long before its end


def test_kill_leaves_nothing_that_looks_finished(tmp_path):
    source = film(tmp_path/"in.avi", numbered(63) * 4, codec="mjpeg", pix_fmt="yuvj420p")
    with subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(tmp_path/"out.mkv")]) as p:
        while not any(f.stat().st_size > 1000 for f in tmp_path.glob(".out*.tmp")) and p.poll() is None: time.sleep(0.02)
        assert p.poll() is None, "over before anything could be seen of it"
        p.send_signal(signal.SIGKILL)
    assert not (tmp_path/"out.mkv").exists()
    parts = list(tmp_path.glob(".out*.tmp"))
    assert len(parts) == 1 and sorted(p.name for p in tmp_path.iterdir()) == sorted([parts[0].name, "in.avi"])
    shown = [f.to_ndarray(format="rgb24") for f in av.open(str(parts[0]), format="matroska").decode(video=0)]
    assert shown and all(f.std() < 3 for f in shown), "what the kill left behind holds no raw frame"


def test_a_full_disk(tmp_path):
    "The system refuses to write more than two kilobytes."
    source = film(tmp_path/"in.avi", [np.random.default_rng(i).integers(0, 255, (64, 96, 3), dtype=np.uint8) for i in range(20)], codec="mjpeg", pix_fmt="yuvj420p")
    code = "import sys, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nfrom penaltyanon.edge.anonymize import anonymize_file\nfrom penaltyanon.edge.guards import FrameAnonymizer\nprint(anonymize_file(sys.argv[1], sys.argv[2], FrameAnonymizer(lambda f: 255 - f)))"
    for suffix in ".mp4", ".mkv", ".avi":
        r = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path/f"out{suffix}")], capture_output=True, text=True, timeout=60)
        assert "'failed'" in r.stdout and "File too large" in r.stdout, r.stdout + r.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.avi"]


# ---- never a raw frame
def fine(rgb):
    "What is left of a picture when everything smooth is taken away."
    g = rgb.astype(float).mean(-1)
    return (4 * g[1:-1, 1:-1] - g[:-2, 1:-1] - g[2:, 1:-1] - g[1:-1, :-2] - g[1:-1, 2:]).ravel()


def share(raw, out): return abs(float(fine(raw) @ fine(out))) / float(fine(raw) @ fine(raw))     # of the raw detail in the output: 1 = all of it


@pytest.mark.parametrize("name", ["blur-strong", "blur-weak", "pixelate", "blackening", "downsample-4x"])
def test_no_frame_is_more_like_the_raw_one_than_the_method_leaves_it(tmp_path, name):
    "Against every raw frame, not only its own: no earlier one is shown instead."
    model = command.open_frame_anonymizer(name, "cpu")
    source = film(tmp_path/"in.mp4", numbered(N, 64, 96), options={"crf": "10"})
    raw = pictures(source)
    own = max(share(r, o) for r in raw for o in model.run(np.stack(raw)))
    for how in dict(), dict(smooth=0.5), dict(batch=3), dict(codec="mpeg4"):
        out = tmp_path/f"{len(str(how))}.mkv"
        assert run(source, out, model, force=True, **how)["status"] == "done"
        assert max(share(r, p) for r in raw for p in pictures(out)) < own + 0.02 < 0.3, how
    assert min(share(r, p) for r, p in zip(raw, pictures(source))) > 0.99


def mutated(data: bytes, rng) -> bytes:
    "A damaged copy: bytes changed, cut off, blanked, removed, doubled."
    d = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(d))), int(rng.integers(1, 200))
        match rng.integers(6):
            case 0: d[at:at + 1] = rng.bytes(1)
            case 1: d[at:at + n] = rng.bytes(n)
            case 2: d[at:at + n] = bytes(n)
            case 3: del d[at:at + n]
            case 4: d[at:at] = d[at:at + n]
            case 5: del d[max(40, at):]
        if len(d) < 2: break
    return bytes(d)


def fuzz(folder: Path, count=500, seed=0):
    "Damaged films in a process of their own: an answer for each, and nothing with structure in any output."
    sys.modules["penaltyanon.edge.anonymize"].SETTLED = 0.0      # what was just made is complete
    folder.mkdir(exist_ok=True)
    kinds = {"a.mp4": {}, "b.avi": dict(codec="mpeg4", options={"bf": "2"}), "c.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"), "d.mkv": dict(options={"g": "5"}), "e.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"}), "f.ts": {}, "g.mov": dict(codec="mpeg4")}
    sources = [film(folder/name, **how) for name, how in kinds.items()]
    clips = sorted((SHARED/"ucf101-mini").rglob("*.avi"), key=lambda p: p.stat().st_size)[:4] if (SHARED/"ucf101-mini").is_dir() else []
    rng, said, slowest = np.random.default_rng(seed), {}, 0
    for i in range(count):
        origin = clips[i % len(clips)] if clips and i % 25 == 0 else sources[i % len(sources)]
        source, out = folder/f"m{i}{origin.suffix}", folder/f"o{i}.mkv"
        source.write_bytes(mutated(origin.read_bytes(), rng))
        began = time.time()
        entry = anonymize_file(source, out, FLAT, Options(batch=4, height=32))
        slowest = max(slowest, time.time() - began)
        assert entry["status"] in ("done", "truncated", "failed") and "\n" not in entry["reason"] and (entry["reason"] or entry["status"] != "failed"), entry
        assert out.exists() == (entry["status"] != "failed"), entry
        if out.exists(): assert is_flat(out) == entry["frames_out"], (i, entry)
        assert not leftovers(folder), entry
        said[entry["status"]] = said.get(entry["status"], 0) + 1
        source.unlink(); out.unlink(missing_ok=True)
    print(json.dumps({**said, "slowest": round(slowest, 2), "cpu": round(time.process_time(), 1)}))


def test_damaged_films(tmp_path):
    "500 of them: no crash, no hang, no raw frame, always an answer."
    r = subprocess.run([sys.executable, __file__, "fuzz", str(tmp_path/"fuzz")], capture_output=True, text=True, timeout=400, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert r.returncode == 0, f"exit code {r.returncode}\n{r.stderr[-3000:]}"
    told = json.loads(r.stdout.splitlines()[-1])
    print(told)
    assert told["slowest"] < 30 and told["done"] > 50 and told["failed"] > 20


# ---- as a stream
def test_memory_does_not_grow_with_the_film(tmp_path):
    "The highest memory of a process for 2 seconds and for 40: the same."
    code = "import sys\nfrom penaltyanon.edge.anonymize import anonymize_file\nfrom penaltyanon.edge.guards import FrameAnonymizer\ne = anonymize_file(sys.argv[1], sys.argv[2], FrameAnonymizer(lambda f: 255 - f))\nprint(e['frames_out'], next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    if not Path("/proc/self/status").exists(): pytest.skip("no /proc here to read a process's highest memory from")
    used = {}
    for n in 50, 1000:
        source = film(tmp_path/f"{n}.avi", [np.full((120, 160, 3), i % 250, np.uint8) for i in range(n)], codec="mjpeg", pix_fmt="yuvj420p")
        frames, kb = map(int, subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path/f"{n}.mp4")], capture_output=True, text=True, timeout=120).stdout.split())
        assert frames == n
        used[n] = kb / 1024
    assert used[1000] - used[50] < 20, used         # MB; the film alone is 58


def test_stages_overlap(tmp_path, monkeypatch):
    "Half a second of reading and half a second of thinking take half a second."
    source = film(tmp_path/"in.avi", numbered(24), codec="mjpeg", pix_fmt="yuvj420p")
    good = streams._upright_rgb
    monkeypatch.setattr(streams, "_upright_rgb", lambda *a: (time.sleep(0.03), good(*a))[1])
    entry = run(source, tmp_path/"out.mp4", FrameAnonymizer(lambda f: (time.sleep(0.03 * len(f)), 255 - f)[1]), batch=2)
    assert entry["seconds"] < 0.85 * sum(entry["stage_seconds"].values()), entry


def test_a_camera_is_stopped_and_its_film_is_whole(tmp_path):
    "A pipe stands for the camera: pictures without end until Ctrl-C."
    source, pipe, out = film(tmp_path/"in.ts", numbered(60), options={"g": "10", "tune": "zerolatency"}), tmp_path/"camera", tmp_path/"out.mkv"
    os.mkfifo(pipe)
    def feed():
        try:
            with open(pipe, "wb") as f:
                while True: f.write(source.read_bytes()); f.flush(); time.sleep(0.05)
        except BrokenPipeError: pass
    threading.Thread(target=feed, daemon=True).start()
    # a shell that starts tests in the background has Ctrl-C ignored, and children inherit that: the camera's process listens again
    code = "import signal, sys, numpy as np\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom penaltyanon.edge import command\nfrom penaltyanon.edge.guards import FrameAnonymizer\nprint(command.closing_line(command.anonymize(sys.argv[1], sys.argv[2], FrameAnonymizer(lambda f: np.full_like(f, 128)))))"
    with subprocess.Popen([sys.executable, "-c", code, str(pipe), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        deadline = time.time() + 60
        while not any(f.stat().st_size > 2000 for f in tmp_path.glob(".out*.tmp")) and time.time() < deadline and p.poll() is None: time.sleep(0.1)
        p.send_signal(signal.SIGINT)
        try: said, errors = p.communicate(timeout=60)
        finally: p.kill()
    assert p.returncode == 0 and "1 stopped of 1 file" in said, said + errors
    report = json.loads((tmp_path/"out.mkv.report.json").read_text())
    assert is_flat(out) == report["frames_out"] > 3


# ---- files, folders, the command
def test_input_is_never_touched(tmp_path, standalone):
    before = standalone.read_bytes(), standalone.stat().st_mtime_ns
    os.link(standalone, tmp_path/"alias.avi"); (tmp_path/"soft.avi").symlink_to(standalone)
    for target in standalone, tmp_path/"alias.avi", tmp_path/"soft.avi":
        assert "is the input itself" in run(standalone, target, force=True)["reason"]
    assert run(standalone, tmp_path/"out.avi")["status"] == "done"
    assert run(standalone, tmp_path/"out.avi")["status"] == "exists" and run(standalone, tmp_path/"out.avi", force=True)["status"] == "done"
    assert (standalone.read_bytes(), standalone.stat().st_mtime_ns) == before


def test_a_folder(tmp_path):
    "Structure kept, broken files named, links in circles and out of the output refused, its own output left alone."
    root, out = tmp_path/"in", tmp_path/"in"/"out"
    (root/"a"/"b").mkdir(parents=True)
    for p in root/"one.mp4", root/"a"/"two.avi", root/"a"/"b"/"three.ts": film(p, codec="mpeg4")
    (root/"a"/"broken.mp4").write_bytes(b"no film"); (root/"a"/"circle").symlink_to(root); (root/"notes.txt").write_text("x")
    for again in range(2):
        told = command.anonymize(root, out, FLAT, Options(force=again > 0, workers=2))
        assert told["status"] == {"done": 3, "refused": 1, "failed": 1} and not told["ok"]
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == ["a/b/three.ts.mp4", "a/two.avi", "anonymize-report.json", "one.mp4"]
    report = json.loads((out/"anonymize-report.json").read_text())
    assert [f["status"] for f in report["files"]] == ["done", "failed", "refused", "done", "done"]
    for f in report["files"]:
        if f["status"] == "done": assert f["output_sha256"] == file_hash(f["output"]) and f["input_sha256"] == file_hash(f["input"]) and f["frames_in"] == f["frames_out"] == N
    shutil.rmtree(out); out.mkdir(); (out/"a").symlink_to(tmp_path)
    told = command.anonymize(root, out, FLAT)
    assert told["status"] == {"done": 1, "refused": 4} and not (tmp_path/"two.avi").exists(), told["status"]


def test_stop_gives_up_films_and_says_so(tmp_path, standalone):
    stop = threading.Event()
    def halts(frames): stop.set(); return np.full_like(frames, 128)
    entry = anonymize_file(standalone, tmp_path/"out.mp4", FrameAnonymizer(halts), Options(batch=2), stop=stop)
    assert entry["status"] == "failed" and "stopped" in entry["reason"] and [p.name for p in tmp_path.iterdir()] == ["in.avi"]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    "The command, in this process (importing PyTorch once is enough)."
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    def call(*args):
        with pytest.raises(SystemExit) as e: cli.main(["anonymize", *map(str, args)])
        out, err = capsys.readouterr()
        return e.value.code, out, err
    yield call
    signal.signal(signal.SIGTERM, before)


def test_the_command_with_no_options(tmp_path, call):
    film(tmp_path/"in.mp4")
    code, out, err = call("in.mp4")
    assert code == 0 and not err, err
    assert "1 done of 1 file; 12 frames with blur-strong" in out and "report: in-anonymized.mp4.report.json" in out
    assert len(pictures(tmp_path/"in-anonymized.mp4")) == N


def test_the_command_with_every_option(tmp_path, call):
    film(tmp_path/"in.mp4", numbered(N, 64, 96), sound=True)
    code, out, err = call("in.mp4", "out.mkv", "--model", "pixelate", "--device", "cpu", "--preview", "look.png", "--smooth", 0.3, "--crf", 30, "--codec", "hevc", "--height", 32, "--batch", 3, "--workers", 2,
                          "--keep-audio", "--force", "--on-bad-frame", "drop", "--widen", 0.1, "--carry", 3, "--ahead", 2, "--report", "r.json")
    assert code == 0, err
    with av.open("out.mkv") as video: assert [s.codec_context.name for s in video.streams] == ["hevc", "aac"]
    report = json.loads(Path("r.json").read_text())
    assert report["options"] == dict(batch=3, height=32, codec="hevc", crf=30, keep_audio=True, on_bad_frame="drop", smooth=0.3, force=True, workers=2, strict=False,
                                     regions=dict(widen=0.1, carry=3, ahead=2), background="keep") and report["model"]["name"] == "pixelate"
    assert np.asarray(Image.open("look.png")).shape == (32, 96, 3)


@pytest.mark.parametrize("line, code, says", [
    ("nowhere.mp4", 1, "No such file"), ("in.mp4 --model blur", 2, "did you mean"), ("in.mp4 --model none.safetensors", 1, "no such file"), ("in.mp4 --model raw", 1, "nearly the identity"),
    ("in.mp4 --on-bad-frame keep", 2, "blank, drop or fail"), ("in.mp4 --device warp", 2, "use auto, cpu"), ("in.mp4 in.mp4 --force", 1, "is the input itself"), ("in.mp4 out.txt", 2, "a video is written as"), ("*.avi", 1, "nothing here")])
def test_mistakes_are_one_line(tmp_path, call, line, code, says):
    film(tmp_path/"in.mp4")
    got, out, err = call(*line.split())
    assert got == code and says in err and err.splitlines()[-1].startswith("error: "), err
    assert not [p.name for p in tmp_path.iterdir() if p.suffix in (".mp4", ".txt") and p.name != "in.mp4"]


def test_an_onnx_file_is_opened_by_its_own_module(tmp_path, monkeypatch):
    stub = type(sys)("penaltyanon.edge.export"); stub.onnx_anonymizer = lambda path, **k: lambda f: 255 - f
    monkeypatch.setitem(sys.modules, "penaltyanon.edge.export", stub)
    (tmp_path/"net.onnx").write_bytes(b"\x08\x07net")
    model = command.open_frame_anonymizer(tmp_path/"net.onnx")
    assert model.name == "net.onnx" and model.sha256 == file_hash(tmp_path/"net.onnx")
    stub.onnx_anonymizer = lambda path, **k: lambda f: f.copy()
    with pytest.raises(UserError, match="nearly the identity"): command.open_frame_anonymizer(tmp_path/"net.onnx")


def test_checkpoints_of_every_architecture_are_opened(tmp_path):
    import torch
    from penaltyanon.nets.anonymizers import UNetPP, save_anonymizer
    from penaltyanon.nets.student import TinyNet
    student = TinyNet((4, 4, 4))
    student.head.bias.data = torch.tensor([-1.0] * 12 + [1.0] * 12)         # it inverts its frames
    save_anonymizer(tmp_path/"student.safetensors", student, {}); save_anonymizer(tmp_path/"net.safetensors", UNetPP(decoder=(16, 8, 8, 8)), {})
    code = "import sys; from penaltyanon.edge.command import open_frame_anonymizer; print([open_frame_anonymizer(f, 'cpu').card['architecture'] for f in sys.argv[1:]])"
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path/"student.safetensors"), str(tmp_path/"net.safetensors")], capture_output=True, text=True, timeout=120)
    assert r.stdout.strip() == "['TinyNet', 'UNetPP']", r.stdout + r.stderr


@real
def test_real_clips(tmp_path):
    "Some of the clips, those with wrong headers among them: all their frames at their moments, and none looks like the raw one."
    rows = list(csv.DictReader(open(SHARED/"ucf101-mini"/"clips.csv")))
    odd = [r for r in rows if r["frames_decoded"] != r["frames_declared"]][:2]
    for row in odd + rows[::120]:
        source = SHARED/"ucf101-mini"/"UCF-101"/row["file"]
        entry = run(source, tmp_path/source.name, FLAT)
        assert (entry["status"], entry["frames_in"], entry["blank"]) == ("done", int(row["frames_decoded"]), 0), entry
        assert is_flat(tmp_path/source.name) == int(row["frames_decoded"])
        assert np.abs(np.subtract(seconds(source)[0], seconds(tmp_path/source.name)[0])).max() < 2e-3


if __name__ == "__main__" and sys.argv[1:2] == ["fuzz"]: fuzz(Path(sys.argv[2]), *map(int, sys.argv[3:]))


def negative_onnx(path):
    "An exported anonymizer that inverts its frames: one operation and a card."
    onnx = pytest.importorskip("onnx")
    from penaltyanon.edge import export
    def frames(name): return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, ["n", "h", "w", 3])
    graph = onnx.helper.make_graph([onnx.helper.make_node("BitwiseNot", ["frames"], ["out"])], "toy", [frames("frames")], [frames("out")])
    net = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    net.metadata_props.add(key="penaltyanon", value=json.dumps({"multiple": 1, "file_sha256": export._NO_CHECKSUM}))
    data = net.SerializeToString()
    path.write_bytes(export._set_checksum(data, export._checksum(data)))


@pytest.mark.parametrize("model", ["blur-strong", "pixelate", "net.onnx"])
def test_what_needs_no_pytorch_does_not_wait_for_it(tmp_path, model):
    "A blur and an exported network start without PyTorch, and without what only training and figures need."
    if model.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
        negative_onnx(tmp_path/model)
        model = str(tmp_path/model)
    film(tmp_path/"in.mp4", numbered(3, 32, 32))
    slow = ("torch", "torchvision", "segmentation_models_pytorch", "pandas", "matplotlib", "scipy", "sklearn", "cv2")
    code = (f"import sys; sys.argv = ['penaltyanon', 'anonymize', {str(tmp_path/'in.mp4')!r}, '--model', {model!r}]\n"
            "from penaltyanon.cli import main\n"
            "try: main()\n"
            f"finally: print('loaded', [name for name in {slow} if name in sys.modules])")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0 and "1 done of 1 file" in said.stdout, said
    assert said.stdout.strip().endswith("loaded []"), said.stdout
