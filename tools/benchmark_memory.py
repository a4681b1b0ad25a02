"""Does the memory of `penaltyanon anonymize` grow with the length of a film? Peak memory for 10 s and for 10 min of 320x240, side by side.

    python tools/benchmark_memory.py --out docs/anonymize_memory.json"""
import argparse, json, os, platform, subprocess, sys, tempfile, time
from datetime import date
from fractions import Fraction
from pathlib import Path

import numpy as np

from penaltyanon.core.files import write_json
from penaltyanon.edge.streams import StreamInfo, Frame, VideoWriter


def film(path: Path, seconds: int, width: int = 320, height: int = 240) -> Path:
    "A pattern that moves, 25 pictures a second, H.264"
    x, y = np.meshgrid(np.arange(2*width), np.arange(height))
    wide = np.stack([(x + y) % 256, (2*x) % 256, (3*y) % 256], -1).astype(np.uint8)
    writer = VideoWriter(path, ".mp4", StreamInfo(width, height, Fraction(25), Fraction(1, 25)))
    for i in range(25*seconds):
        start = abs((2*i) % (2*width) - width)
        writer.write(Frame(np.ascontiguousarray(wide[:, start:start + width]), i, 1, writer.info))
    writer.close()
    return path


def peak(command: list) -> tuple[float, float]:
    "Largest resident memory of a process in MB, and its seconds"
    began, pid = time.monotonic(), os.posix_spawn(command[0], command, os.environ)
    _, status, used = os.wait4(pid, 0)
    assert status == 0, f"{command} ended with {status}"
    return used.ru_maxrss/1024, time.monotonic() - began


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=int, nargs=2, default=(10, 600)); p.add_argument("--model", default="blur-strong"); p.add_argument("--out", default="")
    args, rows = p.parse_args(), []
    with tempfile.TemporaryDirectory() as d:
        for s in args.seconds:
            source = film(Path(d)/f"{s}.mp4", s)
            mb, took = peak([sys.executable, "-m", "penaltyanon.cli", "anonymize", str(source), str(Path(d)/f"{s}-out.mp4"), "--model", args.model])
            rows.append(dict(film_seconds=s, frames=25*s, peak_mb=round(mb, 1), seconds=round(took, 1)))
    said = dict(size="320x240", model=args.model, films=rows, difference_mb=round(rows[1]["peak_mb"] - rows[0]["peak_mb"], 1), date=str(date.today()), machine=f"{os.cpu_count()} cores, {platform.machine()}")
    print(json.dumps(said, indent=1))
    if args.out: write_json(args.out, said)
