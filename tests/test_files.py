"Files as people have them: each kind of fault that was reported of such tools, made here and tried."
import json
import os
import re
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from penaltyanon.data.video import VideoError, frame_count
from penaltyanon.edge import anonymize, command, streams
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.edge.guards import FrameAnonymizer
from penaltyanon.edge.images import load_picture
from penaltyanon.edge.streams import decode_frames
from test_anonymize import N, NEGATIVE, call, film, number, numbered, pictures, run      # noqa: F401 (call is a fixture)

RATE, TICK = 25, Fraction(1, 90000)


def beep(seconds=1.0, rate=16000):
    "A second of sound, as frames for an encoder."
    wave = (np.sin(np.arange(int(seconds * rate)) / 9) * 9000).astype(np.int16)
    sound = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
    sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
    return sound


def talkie(path, order="vs", late=0.0, sound_late=0.0, codec="aac", frames=None, format=None, ahead=False):
    "A film with sound: streams in this order, clocks that start late, sound stored before the picture."
    frames = numbered() if frames is None else frames
    with av.open(str(path), "w", format=format) as video:
        made = {}
        for kind in order:
            if kind == "s": made["s"] = video.add_stream(codec, rate=16000, layout="mono")
            else:
                size = {"width": frames[0].shape[1], "height": frames[0].shape[0]}
                made["v"] = video.add_stream("libx264", rate=RATE, options={"bf": "0"}, pix_fmt="yuv420p", **size)
                made["v"].codec_context.time_base = TICK
        voice, stream = made["s"], made["v"]
        voice.codec_context.bit_rate = 32000
        kind = voice.codec_context.format.name if voice.codec_context.format else "fltp"
        resampler = av.AudioResampler(kind, "mono", 16000, frame_size=voice.codec_context.frame_size or None)
        sound = [packet for frame in [*resampler.resample(beep(len(frames) / RATE)), *resampler.resample(None)]
                 for packet in voice.encode(frame)] + voice.encode()
        for packet in sound:
            shift = round((late + sound_late) / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
        picture = []
        for i, rgb in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = round((late + i / RATE) / TICK), TICK
            picture += stream.encode(frame)
        for packet in [*sound, *picture, *stream.encode()] if ahead else [*picture, *stream.encode(), *sound]: video.mux(packet)
    return path


def sounds(path):
    "Times of the sound packets, seconds from the first picture."
    with av.open(str(path)) as video:
        packets = [p for p in video.demux() if p.size and p.pts is not None]
        first = min(p.pts * p.time_base for p in packets if p.stream.type == "video")
        return [float(p.pts * p.time_base - first) for p in packets if p.stream.type == "audio"]


def shown(path): return [number(255 - rgb) for rgb in pictures(path)]       # what NEGATIVE made


# streams

@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".mov"])
@pytest.mark.parametrize("keep", [False, True])
def test_the_order_of_streams_does_not_matter(tmp_path, suffix, keep):
    source = talkie(tmp_path/f"in{suffix}", "sv")
    for target in "out.mkv", "out.mp4":
        entry = run(source, tmp_path/target, keep_audio=keep)
        assert entry["status"] == "done" and not entry["notes"], entry
        assert shown(tmp_path/target) == list(range(N)) and bool(sounds(tmp_path/target)) == keep


def test_a_second_camera_is_named(tmp_path):
    with av.open(str(tmp_path/"two.mp4"), "w") as video:
        for stream in [video.add_stream("libx264", rate=25, width=w, height=32, pix_fmt="yuv420p") for w in (48, 64)]:
            for rgb in numbered(w=stream.width): video.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
            video.mux(stream.encode())
    entry = run(tmp_path/"two.mp4", tmp_path/"out.mp4")
    assert entry["status"] == "done" and "another video stream was left out" in entry["notes"][0], entry


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".flv", ".mp4", ".mov"])
@pytest.mark.parametrize("with_sound", [True, False])
def test_half_a_film_is_never_done(tmp_path, suffix, with_sound):
    if suffix == ".webm": film(tmp_path/f"in{suffix}", numbered(60), codec="libvpx-vp9")
    elif with_sound: talkie(tmp_path/f"in{suffix}", frames=numbered(60))
    else: film(tmp_path/f"in{suffix}", numbered(60), options={"bf": "0"})
    whole = run(tmp_path/f"in{suffix}", tmp_path/"whole.mkv")
    assert whole["status"] == "done" and whole["frames_out"] == 60, whole
    data = (tmp_path/f"in{suffix}").read_bytes()
    (tmp_path/f"cut{suffix}").write_bytes(data[:len(data) * 6 // 10])
    entry = run(tmp_path/f"cut{suffix}", tmp_path/"cut.mkv")
    assert entry["status"] in ("truncated", "failed"), entry
    if entry["status"] == "truncated": assert shown(tmp_path/"cut.mkv")[:-1] == list(range(entry["frames_out"] - 1))   # the last may be black
    with pytest.raises(VideoError): frame_count(tmp_path/f"cut{suffix}")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("step", [0.04, 1.0, 10.0])
def test_a_last_picture_shown_for_long_is_no_truncation(tmp_path, suffix, step):
    "Slides, time lapse: the last picture is shown for ten seconds."
    moments = [round(i * step / TICK) for i in range(5)]
    source = tmp_path/f"in{suffix}"
    with av.open(str(source), "w") as video:
        stream = video.add_stream("libx264", rate=25, width=48, height=32, pix_fmt="yuv420p", options={"bf": "0"})
        stream.codec_context.time_base = TICK
        packets = []
        for i, rgb in enumerate(numbered(5)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = moments[i], TICK
            packets += stream.encode(frame)
        packets += stream.encode()
        packets[-1].duration = round(10 / TICK)
        video.mux(packets)
    entry = run(source, tmp_path/"out.mp4")
    assert entry["status"] == "done" and not entry["notes"] and entry["frames_out"] == 5, entry
    assert frame_count(source) == 5


def test_a_clock_that_starts_late_starts_at_zero(tmp_path):
    "A transport stream 26 hours into its life: the output begins at 0, sound and all."
    source = talkie(tmp_path/"late.ts", late=94000.0)
    entry = run(source, tmp_path/"out.mp4", keep_audio=True)
    assert entry["status"] == "done" and shown(tmp_path/"out.mp4") == list(range(N)), entry
    with av.open(str(tmp_path/"out.mp4")) as video: assert video.duration / av.time_base < 1
    assert sounds(tmp_path/"out.mp4")[0] < 0.1 and len(sounds(tmp_path/"out.mp4")) >= len(sounds(source)) - 1


def test_matroska_that_starts_late_is_whole(tmp_path):
    entry = run(talkie(tmp_path/"late.mkv", late=3600.0), tmp_path/"out.mkv")
    assert entry["status"] == "done" and not entry["notes"], entry
    first = next(decode_frames(tmp_path/"out.mkv"))
    assert abs(float(first.pts * first.info.time_base) - 3600) < 0.01


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "frag_keyframe+empty_moov+default_base_moof"])
@pytest.mark.parametrize("part", [0.35, 0.5, 0.8])
def test_a_film_in_fragments_that_was_cut(tmp_path, flags, part):
    "Dashcams and screen recorders write so: a file that was cut declares what is left of it."
    with av.open(str(tmp_path/"whole.mp4"), "w", options={"movflags": flags}) as video:
        stream = video.add_stream("libx264", rate=25, width=48, height=32, pix_fmt="yuv420p", options={"g": "10", "bf": "0"})
        for rgb in numbered(60): video.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        video.mux(stream.encode())
    assert run(tmp_path/"whole.mp4", tmp_path/"whole.mkv")["status"] == "done"
    data = (tmp_path/"whole.mp4").read_bytes()
    (tmp_path/"cut.mp4").write_bytes(data[:int(len(data) * part)])
    entry = run(tmp_path/"cut.mp4", tmp_path/"cut.mkv")
    assert entry["status"] == "truncated" and "bytes are missing" in entry["notes"][0], entry


def test_a_file_that_does_not_say_where_it_ends(tmp_path):
    with av.open(str(tmp_path/"live.mkv"), "w", options={"live": "1"}) as video:
        stream = video.add_stream("libx264", rate=25, width=48, height=32, pix_fmt="yuv420p", options={"bf": "0"})
        for rgb in numbered(30): video.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        video.mux(stream.encode())
    entry = run(tmp_path/"live.mkv", tmp_path/"out.mkv")
    assert entry["status"] == "done" and any("does not say where it ends" in note for note in entry["notes"]), entry


# sound

@pytest.mark.parametrize("target", ["out.mkv", "out.mp4"])
def test_sound_of_two_recordings_joined(tmp_path, target):
    "The clock jumps back in the middle: the sound goes on, as the picture does."
    one = talkie(tmp_path/"one.ts", frames=numbered(50))
    (tmp_path/"joined.ts").write_bytes(one.read_bytes() * 2)
    entry = run(tmp_path/"joined.ts", tmp_path/target, keep_audio=True)
    times = sounds(tmp_path/target)
    assert entry["status"] == "done" and entry["frames_out"] == 100, entry
    assert len(times) >= 2 * len(sounds(one)) - 3 and abs(times[-1] - 3.95) < 0.2 and times == sorted(times)


@pytest.mark.parametrize("target", ["out.mp4", "out.mkv"])
def test_sound_stored_before_the_picture_is_kept(tmp_path, target):
    source = talkie(tmp_path/"ahead.mkv", ahead=True)
    entry = run(source, tmp_path/target, keep_audio=True)
    assert entry["status"] == "done", entry
    before, after = sounds(source), sounds(tmp_path/target)
    assert len(before) == len(after) and max(abs(a - b) for a, b in zip(before, after)) < 0.025


def test_two_packets_of_sound_at_one_time(tmp_path):
    source = talkie(tmp_path/"in.mkv")
    with av.open(str(source)) as video, av.open(str(tmp_path/"twice.nut"), "w") as out:
        made = {s.index: out.add_stream_from_template(s) for s in video.streams}
        for i, packet in enumerate(p for p in video.demux() if p.size):
            packet.stream = made[packet.stream.index]
            out.mux(packet)
    copy = streams._SoundCopy(None, Fraction(0))
    class Packet:
        def __init__(self, dts): self.pts, self.dts, self.time_base = dts, dts, Fraction(1, 1000)
    assert [len(copy.take(Packet(dts))) for dts in (0, 20, 20, 10, 40)] == [1, 1, 0, 0, 1]
    assert run(tmp_path/"twice.nut", tmp_path/"out.mp4", keep_audio=True)["status"] == "done"


@pytest.mark.parametrize("codec, source, target, anew", [
    ("wmav2", "in.asf", "out.mp4", "aac"), ("wmav2", "in.asf", "out.mkv", "aac"), ("pcm_alaw", "in.mov", "out.mp4", "aac"), ("aac", "in.mp4", "out.webm", "libopus"), ("aac", "in.mp4", "out.mov", "")])
def test_sound_that_does_not_fit_is_encoded_anew(tmp_path, codec, source, target, anew):
    entry = run(talkie(tmp_path/source, codec=codec, frames=numbered(25)), tmp_path/target, keep_audio=True)
    assert entry["status"] == "done" and bool(anew) == any(f"sound was encoded anew ({anew})" in note for note in entry["notes"]), entry
    times = sounds(tmp_path/target)
    assert abs(times[0]) < 0.1 and 0.8 < times[-1] < 1.15


# pictures of a film

def test_a_plain_picture_is_anonymized_and_not_an_error(tmp_path):
    "A blue screen comes back from a blur as it was."
    blue = [np.broadcast_to(np.uint8([0, 0, 255]), (32, 48, 3)).copy()] * 5
    film(tmp_path/"blue.mp4", [*numbered(5), *blue])
    entry = anonymize_file(tmp_path/"blue.mp4", tmp_path/"out.mp4", command.open_frame_anonymizer("blur-strong"))
    assert entry["status"] == "done" and not entry["blank"] and not entry["errors"], entry
    assert pictures(tmp_path/"out.mp4")[-1][..., 2].mean() > 200


def test_a_recording_that_begins_between_key_frames(tmp_path):
    film(tmp_path/"whole.ts", numbered(30), options={"bf": "0", "g": "10", "sc_threshold": "0"})
    with av.open(str(tmp_path/"whole.ts")) as video, av.open(str(tmp_path/"mid.ts"), "w") as cut:
        stream = cut.add_stream_from_template(video.streams.video[0])
        for i, packet in enumerate(p for p in video.demux(video.streams.video[0]) if p.size):
            if i < 4: continue
            packet.stream = stream
            cut.mux(packet)
    entry = run(tmp_path/"mid.ts", tmp_path/"out.mp4")
    assert entry["status"] == "done" and shown(tmp_path/"out.mp4") == list(range(10, 30)), entry
    assert re.search(r"\d frames before the first that can be decoded were left out", " ".join(entry["notes"])), entry


def test_a_damaged_first_key_frame_is_black_and_counted(tmp_path):
    film(tmp_path/"in.mp4", numbered(40), options={"bf": "0", "g": "20", "sc_threshold": "0"})
    with av.open(str(tmp_path/"in.mp4")) as video: first = next(p for p in video.demux(video=0) if p.size)
    data = bytearray((tmp_path/"in.mp4").read_bytes())
    data[first.pos + 5:first.pos + first.size] = bytes(first.size - 5)
    (tmp_path/"hurt.mp4").write_bytes(data)
    entry = run(tmp_path/"hurt.mp4", tmp_path/"out.mp4")
    assert entry["frames_in"] == 40 and entry["frames_out"] == 40 and entry["blank"] >= 1, entry
    assert not any("left out" in note for note in entry["notes"]), entry
    assert run(tmp_path/"hurt.mp4", tmp_path/"fail.mp4", on_bad_frame="fail")["status"] == "failed"


def test_best_quality_plays_everywhere(tmp_path):
    film(tmp_path/"in.mp4")
    assert run(tmp_path/"in.mp4", tmp_path/"out.mp4", crf=0)["status"] == "done"
    with av.open(str(tmp_path/"out.mp4")) as video:
        context = video.streams.video[0].codec_context
        assert context.pix_fmt == "yuv420p" and "Predictive" not in (context.profile or "")


def test_interlaced_frames_are_deinterlaced_and_that_is_said(tmp_path):
    film(tmp_path/"in.mkv", codec="mpeg2video", options={"flags": "+ildct+ilme", "top": "1"})
    if not any(f.interlaced_frame for f in av.open(str(tmp_path/"in.mkv")).decode(video=0)):
        pytest.skip("this build of FFmpeg does not flag interlaced frames")
    entry = run(tmp_path/"in.mkv", tmp_path/"out.mkv")
    assert entry["status"] == "done" and "interlaced frames were deinterlaced" in entry["notes"], entry


def test_a_size_that_changes_on_the_way_is_said(tmp_path):
    def part(name, h, w): return film(tmp_path/name, numbered(6, h, w), options={"bf": "0", "x264-params": "repeat-headers=1"}).read_bytes()
    (tmp_path/"in.h264").write_bytes(part("a.h264", 32, 48) + part("b.h264", 64, 48))
    entry = run(tmp_path/"in.h264", tmp_path/"out.mp4")
    assert entry["status"] == "done" and entry["frames_out"] == 12, entry
    assert any("the size changes on the way" in note for note in entry["notes"]), entry
    assert {p.shape for p in pictures(tmp_path/"out.mp4")} == {(32, 48, 3)}


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile in.mp4\n", "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nin.ts\n#EXT-X-ENDLIST\n"])
def test_a_play_list_is_no_film(tmp_path, text):
    film(tmp_path/"in.mp4"), film(tmp_path/"in.ts")
    (tmp_path/"list.mp4").write_text(text)
    entry = run(tmp_path/"list.mp4", tmp_path/"out.mp4")
    assert entry["status"] == "failed" and not (tmp_path/"out.mp4").exists(), entry


def test_a_file_that_grows_is_not_done(tmp_path):
    source = film(tmp_path/"in.ts", numbered(30))
    def slowly(frames):
        with open(source, "ab") as file: file.write(b"\x47" + bytes(187))
        return 255 - frames
    entry = anonymize_file(source, tmp_path/"out.mp4", FrameAnonymizer(slowly))
    assert entry["status"] == "truncated" and "changed while it was read" in " ".join(entry["notes"]), entry


def test_a_file_that_grows_between_two_looks_is_not_done(tmp_path, monkeypatch):
    "The recorder writes again only after all that was there has been read."
    monkeypatch.setattr(anonymize, "SETTLED", 2.0)
    source = film(tmp_path/"in.ts", numbered(10))
    def write_again():
        with open(source, "ab") as file: file.write(b"\x47" + bytes(187))
    later = threading.Timer(1.5, write_again)
    later.start()
    entry = anonymize_file(source, tmp_path/"out.mp4", FrameAnonymizer(lambda frames: 255 - frames))
    later.join()
    assert entry["frames_in"] == 10 and entry["status"] == "truncated" and "changed while it was read" in " ".join(entry["notes"]), entry


# images

def animation(path, n=4):
    frames = [Image.fromarray(np.full((30, 40, 3), 40 * i + 30, np.uint8)) for i in range(n)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({} if path.suffix == ".tiff" else {"duration": 70}))
    return path


@pytest.mark.parametrize("suffix", [".webp", ".png", ".tiff", ".avif"])
def test_every_picture_of_an_image_file(tmp_path, suffix):
    entry = run(animation(tmp_path/f"in{suffix}"), tmp_path/f"out{suffix}")
    found = load_picture(tmp_path/f"out{suffix}")
    assert entry["status"] == "done" and len(found.frames) == 4, entry
    assert np.allclose([f.mean() for f in found.frames], [225, 185, 145, 105], atol=6)
    assert suffix == ".tiff" or found.durations == [70] * 4
    refused = run(animation(tmp_path/f"in{suffix}"), tmp_path/"out.jpg")
    assert refused["status"] == "failed" and "do not fit into .jpg" in refused["reason"] and not (tmp_path/"out.jpg").exists()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_transparency_stays_and_what_it_hides_goes(tmp_path, suffix):
    pixels = np.full((40, 40, 4), (20, 200, 30, 255), np.uint8)
    pixels[:, :20] = (250, 10, 10, 0)
    Image.fromarray(pixels).save(tmp_path/f"in{suffix}", **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    entry = anonymize_file(tmp_path/f"in{suffix}", tmp_path/f"out{suffix}", command.open_frame_anonymizer("blur-weak"))
    out = np.asarray(Image.open(tmp_path/f"out{suffix}").convert("RGBA")).astype(int)
    assert entry["status"] == "done" and Image.open(tmp_path/f"out{suffix}").mode == "RGBA", entry
    assert out[:, :8, 3].mean() < 90 < 165 < out[:, -8:, 3].mean() and not (out[..., 0] > 120).any()


def test_colours_with_a_profile_are_converted(tmp_path):
    "The same numbers mean other colours in a profile with red and blue exchanged; sRGB is what comes out."
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    srgb = ImageCms.createProfile("sRGB")
    image = Image.fromarray(np.full((20, 20, 3), (200, 80, 40), np.uint8))
    image.save(tmp_path/"in.png", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    assert lab and run(tmp_path/"in.png", tmp_path/"out.png")["status"] == "done"
    out = Image.open(tmp_path/"out.png")
    assert "icc_profile" not in out.info and np.abs(np.asarray(out).astype(int) - (55, 175, 215)).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_a_profile_does_not_uncover_what_is_transparent(tmp_path, mode):
    pixels = np.full((20, 20, 4), (120, 120, 120, 255), np.uint8)
    pixels[:, :10, 3] = 0
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path/"in.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    found = load_picture(tmp_path/"in.png")
    assert found.alpha and np.unique(found.alpha[0][:, :9]).tolist() == [0] and np.unique(found.alpha[0][:, 11:]).tolist() == [255]


def test_a_photograph_that_is_too_large_says_so(tmp_path):
    Image.new("L", (12000, 9000)).save(tmp_path/"large.png")
    entry = run(tmp_path/"large.png", tmp_path/"out.png")
    assert entry["status"] == "failed" and "too large, 12000 x 9000" in entry["reason"] and "damaged" not in entry["reason"]


def test_tiles_of_a_telephone_are_refused(tmp_path):
    "A HEIC file is a photograph in tiles; its brand says so."
    film(tmp_path/"in.mp4")
    data = (tmp_path/"in.mp4").read_bytes()
    (tmp_path/"photo.heic").write_bytes(data[:8] + b"heic" + data[12:])
    entry = run(tmp_path/"photo.heic", tmp_path/"out.mp4")
    assert entry["status"] == "failed" and "is a photograph (heic); convert it" in entry["reason"], entry


# names and places

def test_names_with_colons(tmp_path, call):
    film(tmp_path/"film.mp4").rename(tmp_path/"12:30:00.mp4")
    code, out, err = call("12:30:00.mp4")
    assert code == 0 and (tmp_path/"12:30:00-anonymized.mp4").is_file(), err


@pytest.mark.parametrize("stem", ["a" * 240, "\N{GRINNING FACE}" * 60, "n" * 251, "\N{CJK UNIFIED IDEOGRAPH-8A18}" * 80])
def test_names_as_long_as_the_system_allows(tmp_path, call, stem):
    film(tmp_path/"film.mp4").rename(tmp_path/f"{stem}.mp4")
    code, out, err = call(f"{stem}.mp4")
    made = [p.name for p in tmp_path.iterdir() if p.name != f"{stem}.mp4"]
    assert code == 0 and sorted(re.sub(r".*(\.report\.json|\.mp4)$", r"\1", name) for name in made) == [".mp4", ".report.json"], (err, made)


def test_a_folder_that_cannot_be_written_to_is_one_line_before_any_work(tmp_path, call, monkeypatch):
    film(tmp_path/"in.mp4")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, out, err = call("in.mp4")
    assert code == 1 and err.startswith("error: ") and "cannot be written to" in err and len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_a_folder_lists_what_it_did_not_touch(tmp_path, call):
    (tmp_path/"in").mkdir()
    film(tmp_path/"in"/"film.mp4")
    for name in "photo.heic", "notes.txt", "nosuffix": (tmp_path/"in"/name).write_bytes(b"x")
    code, out, err = call("in", "out")
    report = json.loads((tmp_path/"out"/"anonymize-report.json").read_text())
    assert code == 0 and "NOT touched" in out and [Path(p).name for p in report["untouched"]] == ["nosuffix", "notes.txt", "photo.heic"]
    code, out, err = call("in", "out2", "--strict")
    assert code == 1 and "not everything was anonymized" in err


@pytest.mark.parametrize("line", ["in.mp4 out.mp4 --report in.mp4", "in.mp4 out.mp4 --preview ./out.mp4 --force", "in.mp4 out.mp4 --report r.json --preview r.json"])
def test_report_and_preview_take_the_place_of_no_film(tmp_path, call, line):
    before = film(tmp_path/"in.mp4").read_bytes()
    code, out, err = call(*line.split())
    assert code == 2 and "name another file" in err and (tmp_path/"in.mp4").read_bytes() == before and not (tmp_path/"out.mp4").exists()


@pytest.mark.parametrize("pattern", ["./in/*.mp4", "in/**/*.mp4"])
def test_what_a_pattern_finds_is_not_called_untouched(tmp_path, call, pattern):
    (tmp_path/"in").mkdir()
    film(tmp_path/"in"/"a.mp4")
    for target in "in/out", "in/out", "out2":
        code, out, err = call(pattern, target, "--strict", "--force")
        assert code == 0 and "NOT touched" not in out, (target, out, err)


def test_a_password_is_shown_nowhere(tmp_path, call):
    code, out, err = call("http://anna:hunter2@127.0.0.1:9/cam.ts?token=hunter2", "x.mkv")
    reports = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert code == 1 and "hunter2" not in out + err + reports and "***@127.0.0.1" in err
