"""Are the films of an anonymized folder as long as their originals? Every file's frames, duration and presentation times are compared by decoding both
(packets would not do: some clips hold packets that no picture comes from).

    penaltyanon anonymize IN OUT --workers 2 && python tools/check_folder.py IN OUT --clips clips.csv --out docs/anonymize_ucf101_mini.json"""
import argparse, csv, json, sys
from datetime import date
from pathlib import Path

import av

from penaltyanon.core import read_json, write_json


def times(path: Path) -> tuple[list[float], float]:
    "Presentation times of all pictures, in seconds from the first, and the duration of the last"
    with av.open(str(path)) as video:
        stream = video.streams.video[0]
        stream.thread_type, step = "AUTO", 1/float(stream.average_rate)
        at = sorted(float(f.pts * f.time_base) for f in video.decode(stream))      # AVI with B-frames gives times of decoding
        return [t - at[0] for t in at], step


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", type=Path); p.add_argument("target", type=Path); p.add_argument("--clips", type=Path); p.add_argument("--out", default="")
    args = p.parse_args()
    sources = sorted(f for f in args.source.rglob("*") if f.suffix in (".avi", ".mp4", ".mkv"))
    report = read_json(next(args.target.rglob("*report*.json"), None) or next(args.source.parent.rglob("*report*.json")))
    worst, frames, different = 0.0, 0, []
    for f in sources:
        (a, step), (b, _) = times(f), times(args.target/f.relative_to(args.source))
        shift = max((abs(x - y) for x, y in zip(a, b)), default=0.0)
        worst, frames = max(worst, shift), frames + len(b)
        if len(a) != len(b) or shift > step/2: different.append(str(f.relative_to(args.source)))
    listed = sum(int(r["frames_decoded"]) for r in csv.DictReader(open(args.clips))) if args.clips else None
    said = dict(files=len(sources), done=sum(e["status"] == "done" for e in report["files"]), frames_out=frames, frames_listed=listed, worst_shift_s=round(worst, 6), files_that_differ=different,
                report_frames_in=sum(e["frames_in"] for e in report["files"]), report_frames_out=sum(e["frames_out"] for e in report["files"]), model=report["model"]["name"], date=str(date.today()))
    print(json.dumps(said, indent=1))
    if args.out: write_json(args.out, said)
    sys.exit(bool(different))
