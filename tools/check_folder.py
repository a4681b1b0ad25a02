"""Are the videos of an anonymized folder as long as their originals? Every file's frames, duration and presentation times
are compared by decoding both (packets would not do: some clips hold packets that yield no frame). An output begins at 0;
what counts is the time after the first frame.

    penaltyanon anonymize IN OUT --workers 2 --report report.json
    python tools/check_folder.py IN OUT --report report.json --clips clips.csv --out docs/anonymize_ucf101_mini.json"""
import argparse, csv, json, sys
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import av

from penaltyanon.core.files import read_json, write_json
from penaltyanon.data.video import VIDEO_SUFFIXES, open_video


@dataclass
class Timing:
    "When a video shows its frames, in seconds."
    stamps: list[float]     # of all frames, sorted: AVI with B-frames gives times of decoding
    step: float             # from one frame to the next, nominally
    stream_duration: float
    file_duration: float


def read_timing(path: Path) -> Timing:
    "Decode a whole video."
    with open_video(path, threads=True) as (container, stream):
        stream.thread_type = "AUTO"
        stamps = sorted(float(frame.pts * frame.time_base) for frame in container.decode(stream))
        step = 1/float(stream.average_rate)
        return Timing(stamps, step, float(stream.duration*stream.time_base), container.duration/av.time_base)


def compare_timing(a: Timing, b: Timing) -> dict[str, float]:
    "Largest difference of the frames' times after the first one, of the stream's duration, of the file's; seconds."
    shifts = [abs((x - a.stamps[0]) - (y - b.stamps[0])) for x, y in zip(a.stamps, b.stamps)]
    return dict(shift=max(shifts, default=0.0), stream=abs(a.stream_duration - b.stream_duration),
                file=abs(a.file_duration - b.file_duration))


def check_folder(source: Path, target: Path) -> dict:
    "Compare every video of a folder with its output."
    files = sorted(f for f in source.rglob("*") if f.suffix in VIDEO_SUFFIXES)
    frames, starts, different, worst = 0, Counter(), [], dict(shift=0.0, stream=0.0, file=0.0)
    for file in files:
        a, b = read_timing(file), read_timing(target/file.relative_to(source))
        off = compare_timing(a, b)
        frames += len(b.stamps)
        worst = {key: max(worst[key], off[key]) for key in off}
        starts[f"{a.stamps[0]:.3f} s -> {b.stamps[0]:.3f} s"] += 1
        is_same = len(a.stamps) == len(b.stamps) and max(off["shift"], off["stream"]) <= a.step/2 and b.stamps[0] == 0
        if not is_same: different.append(str(file.relative_to(source)))
    worst = {key: round(value, 6) for key, value in worst.items()}
    return dict(
        files=len(files), frames_out=frames, files_that_differ=different,
        worst_difference_s={"time after the first picture": worst["shift"], "length of the video stream": worst["stream"],
                            "length of the file, sound included": worst["file"]},
        first_picture=dict(starts.most_common()),
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path)
    p.add_argument("target", type=Path)
    p.add_argument("--report", type=Path, required=True)
    p.add_argument("--clips", type=Path)
    p.add_argument("--out", default="")
    args = p.parse_args()
    entries, model = (read_json(args.report)[key] for key in ("files", "model"))
    listed = sum(int(r["frames_decoded"]) for r in csv.DictReader(open(args.clips))) if args.clips else None
    result = dict(
        check_folder(args.source, args.target),
        done=sum(e["status"] == "done" for e in entries), frames_listed=listed,
        report_frames_in=sum(e["frames_in"] for e in entries), report_frames_out=sum(e["frames_out"] for e in entries),
        model=model["name"], date=str(date.today()),
    )
    print(json.dumps(result, indent=1))
    if args.out: write_json(args.out, result)
    sys.exit(bool(result["files_that_differ"]))
