"""Are the films of an anonymized folder as long as their originals? Every file's frames, duration and presentation times are compared by decoding both
(packets would not do: some clips hold packets that no picture comes from). An output begins at 0; what counts is the time after the first picture.

    penaltyanon anonymize IN OUT --workers 2 --report report.json && python tools/check_folder.py IN OUT --report report.json --clips clips.csv --out docs/anonymize_ucf101_mini.json"""
import argparse, csv, json, sys
from collections import Counter
from datetime import date
from pathlib import Path

import av

from penaltyanon.core.files import read_json, write_json


def times(path: Path) -> tuple[list[float], float, float, float]:
    "Presentation times of all pictures; seconds between two, of the video stream, and of the whole file"
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        stream.thread_type, step = "AUTO", 1/float(stream.average_rate)
        at = sorted(float(f.pts * f.time_base) for f in video.decode(stream))      # AVI with B-frames gives times of decoding
        return at, step, float(stream.duration*stream.time_base), video.duration/av.time_base


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path); p.add_argument("target", type=Path); p.add_argument("--report", type=Path, required=True); p.add_argument("--clips", type=Path); p.add_argument("--out", default="")
    args = p.parse_args()
    sources = sorted(f for f in args.source.rglob("*") if f.suffix in (".avi", ".mp4", ".mkv"))
    report = read_json(args.report)
    frames, starts, different, worst = 0, Counter(), [], dict(shift=0.0, stream=0.0, file=0.0)
    for f in sources:
        (a, step, long, whole), (b, _, long_b, whole_b) = times(f), times(args.target/f.relative_to(args.source))
        off = dict(shift=max((abs(x - a[0] - y + b[0]) for x, y in zip(a, b)), default=0.0), stream=abs(long - long_b), file=abs(whole - whole_b))
        frames, worst = frames + len(b), {k: max(worst[k], off[k]) for k in off}
        starts[f"{a[0]:.3f} s -> {b[0]:.3f} s"] += 1
        if len(a) != len(b) or max(off["shift"], off["stream"]) > step/2 or b[0]: different.append(str(f.relative_to(args.source)))
    listed = sum(int(r["frames_decoded"]) for r in csv.DictReader(open(args.clips))) if args.clips else None
    said = dict(files=len(sources), done=sum(e["status"] == "done" for e in report["files"]), frames_out=frames, frames_listed=listed, files_that_differ=different,
                worst_difference_s={"time after the first picture": round(worst["shift"], 6), "length of the video stream": round(worst["stream"], 6), "length of the file, sound included": round(worst["file"], 6)},
                first_picture=dict(starts.most_common()),
                report_frames_in=sum(e["frames_in"] for e in report["files"]), report_frames_out=sum(e["frames_out"] for e in report["files"]), model=report["model"]["name"], date=str(date.today()))
    print(json.dumps(said, indent=1))
    if args.out: write_json(args.out, said)
    sys.exit(bool(different))
