"""Does the memory of `penaltyanon anonymize` grow with the length of a video? Peak memory for 10 s and for 10 min of 320x240.

    python tools/benchmark_memory.py --out docs/anonymize_memory.json"""
import argparse, json, os, platform, sys, tempfile, time
from datetime import date
from fractions import Fraction
from pathlib import Path

import numpy as np

from penaltyanon.core.files import write_json
from penaltyanon.data.video import StreamInfo
from penaltyanon.edge.streams import Frame, VideoWriter

FPS = 25


def write_moving_pattern(path: Path, seconds: int, width: int = 320, height: int = 240) -> Path:
    "A pattern that moves to and fro, 25 frames a second, H.264."
    x, y = np.meshgrid(np.arange(2*width), np.arange(height))
    wide = np.stack([(x + y) % 256, (2*x) % 256, (3*y) % 256], -1).astype(np.uint8)
    writer = VideoWriter(path, ".mp4", StreamInfo(width, height, time_base=Fraction(1, FPS), rate=Fraction(FPS)))
    for i in range(FPS*seconds):
        start = abs((2*i) % (2*width) - width)
        writer.write(Frame(np.ascontiguousarray(wide[:, start:start + width]), i, 1, writer.info))
    writer.close()
    return path


def measure_peak(command: list) -> tuple[float, float]:
    "Largest resident memory of a process in MB, and its seconds."
    began, pid = time.monotonic(), os.posix_spawn(command[0], command, os.environ)
    _, status, used = os.wait4(pid, 0)
    assert status == 0, f"{command} ended with {status}"
    return used.ru_maxrss/1024, time.monotonic() - began


def measure_video(folder: Path, seconds: int, model: str) -> dict:
    "Anonymize a video of this length by the command."
    source = write_moving_pattern(folder/f"{seconds}.mp4", seconds)
    target = folder/f"{seconds}-out.mp4"
    command = [sys.executable, "-m", "penaltyanon.cli", "anonymize", str(source), str(target), "--model", model]
    mb, took = measure_peak(command)
    return dict(film_seconds=seconds, frames=FPS*seconds, peak_mb=round(mb, 1), seconds=round(took, 1))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=int, nargs=2, default=(10, 600))
    p.add_argument("--model", default="blur-strong")
    p.add_argument("--out", default="")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as d: rows = [measure_video(Path(d), s, args.model) for s in args.seconds]
    result = dict(
        size="320x240", model=args.model, films=rows, difference_mb=round(rows[1]["peak_mb"] - rows[0]["peak_mb"], 1),
        date=str(date.today()), machine=f"{os.cpu_count()} cores, {platform.machine()}",
    )
    print(json.dumps(result, indent=1))
    if args.out: write_json(args.out, result)
