"""How many frames a second: f_A in PyTorch and ONNX, its student, a blur, and deface, on the same files, in one run.

    python tools/benchmark_throughput.py anonymizer.safetensors --student student.safetensors \\
        --deface /tmp/deface --out throughput.json

All rows take turns, so that a busy machine is unfair to nobody; the table shows the best of all rounds and the JSON
each of them. A row that fails is named with its reason, in the JSON too, and the exit code is 1; the other rows are
measured all the same. `model` is frames in memory to frames in memory; `file` is video in, video out, with decoding and
encoding, without starting the program. 10 to 15 minutes on two idle cores. deface (PyPI, CenterFace) is installed by pip
into a folder of its own, together with the onnxruntime that makes it fast."""
import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from datetime import date
from fractions import Fraction
from functools import partial
from pathlib import Path


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="f_A, *.safetensors")
    p.add_argument("--student", default="", help="its student, *.safetensors; else one is distilled here")
    p.add_argument("--steps", type=int, default=1000, help="of distilling, when no student is given")
    p.add_argument("--data", default="",
                   help="frames for distilling and for calibrating int8, loader:folder; else generated ones")
    p.add_argument("--deface", default="",
                   help="folder of an environment with deface; made when missing; '' leaves deface out")
    p.add_argument("--sizes", nargs="+", default=["320x240", "1280x720"], help="WxH")
    p.add_argument("--frames", type=int, default=100,
                   help="in a file of 320x240; fewer in larger ones, at least 16")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--cores", type=int, default=2)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                   help="cpu or cuda; on a GPU only what PyTorch runs there is measured")
    p.add_argument("--only", nargs="+", default=[], help="rows whose names contain one of these")
    p.add_argument("--out", default="",
                   help="JSON with every number; written after each size, so that what is measured is kept")
    p.add_argument("--markdown", default="", help="the table, as it is printed")
    return p.parse_args()


args = arguments()
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:args.cores]))      # deface inherits it
os.environ["OMP_NUM_THREADS"] = str(args.cores)
import av
import numpy as np
import torch
import penaltyanon.nets.student       # registers its architecture
from penaltyanon.core.files import write_json
from penaltyanon.core.machine import has_fast_bf16, resolve_device
from penaltyanon.data.video import StreamInfo
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.edge.command import torch_runner
from penaltyanon.edge.export import export_onnx, onnx_anonymizer, torch_anonymizer
from penaltyanon.edge.guards import FrameAnonymizer, probe_frames
from penaltyanon.edge.streams import Frame, VideoWriter, decode_frames
from penaltyanon.nets.anonymizers import load_anonymizer
from penaltyanon.nets.obfuscation import OBFUSCATIONS
from penaltyanon.train.distill import DistillOptions, count_gmacs, distill, fidelity, sample_frames

torch.set_num_threads(args.cores)
DEVICE = resolve_device(args.device)
BF16 = has_fast_bf16(torch.device(DEVICE))       # else it is emulated, and no row
TYPES = {"f_A, PyTorch fp32": torch.float32, "f_A, PyTorch bf16": torch.bfloat16,
         "f_A, ONNX fp32": torch.float32}        # rows that are compared with matrix products
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)


def clip(path: Path, width: int, height: int, frames: int) -> Path:
    "A generated video: a drawn scene that the camera pans across, with noise; H.264"
    wide, rng = probe_frames(1, height, 2*width)[0], np.random.default_rng(0)
    writer = VideoWriter(path, ".mp4", StreamInfo(width, height, time_base=Fraction(1, 25), rate=Fraction(25)))
    for i in range(frames):
        x = abs((4*i) % (2*width) - width)
        frame = wide[:, x:x + width] + rng.normal(0, 3, (height, width, 1))
        writer.write(Frame(frame.clip(0, 255).astype(np.uint8), i, 1, writer.info))
    writer.close()
    return path


def runner(net):
    "Bytes to bytes by PyTorch, on the CPU or the GPU"
    return torch_anonymizer(net) if DEVICE == "cpu" else torch_runner(net, DEVICE)


def bf16(net):
    "PyTorch in bfloat16, channels last: f_A at its fastest on a machine that has the instructions"
    run = runner(net.to(memory_format=torch.channels_last))
    def anonymize(frames):
        with torch.autocast(DEVICE, torch.bfloat16): return run(frames)
    return anonymize


def matmul_rate(dtype, n=2048) -> float:
    "GFLOP/s of one large matrix product, best of 5"
    a, best = torch.rand(n, n).to(dtype), 1e9
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2*n**3/best/1e9


def deface_python(folder: Path) -> str:
    "The interpreter of deface's own environment, made when missing"
    python = folder/"bin/python"
    if not python.exists(): venv.create(folder, with_pip=True)
    if subprocess.run([python, "-c", "import deface, onnx, onnxruntime"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "install", "-q", "deface==1.5.0", "onnx", "onnxruntime"], check=True)
    return str(python)


def deface_seconds(python: str, source: Path, out: Path) -> float:
    "Wall time of the whole command"
    start = time.perf_counter()
    subprocess.run([python, "-m", "deface.deface", str(source), "-o", str(out)], **quiet)
    return time.perf_counter() - start


# ---- what is measured: name -> (frames to frames), all from the same weights
def export_rows(models: dict, frames, tmp: Path) -> tuple[dict, dict]:
    "ONNX files of every model in both precisions: the functions, and their differences to PyTorch"
    runs, cards = {}, {}
    for name, model in models.items():
        for precision in ("fp32", "int8"):
            row, path = f"{name}, ONNX {precision}", tmp/f"{name}-{precision}.onnx"
            traced = tmp/f"{name}-fp32.onnx" if precision == "int8" else None
            cards[row] = export_onnx(model, path, precision, frames=frames, traced=traced)["difference"]
            runs[row] = onnx_anonymizer(path, threads=args.cores)
    return runs, cards


def networks(tmp: Path) -> tuple[dict, dict]:
    "The functions, and what their files' cards say"
    path = args.student or str(tmp/"student.safetensors")
    if not args.student: distill(args.model, path, DistillOptions(args.data, args.steps))
    (f_A, _), frames = load_anonymizer(args.model), sample_frames(args.data, 12, 240, 320)
    runs, cards = {"f_A, PyTorch fp32": runner(f_A)}, {}
    if BF16: runs["f_A, PyTorch bf16"] = bf16(load_anonymizer(args.model)[0])
    runs["student, PyTorch fp32"] = runner(load_anonymizer(path)[0])
    if DEVICE == "cpu":
        exported, cards = export_rows({"f_A": args.model, "student": path}, frames, tmp)
        runs |= exported
    runs["blur-strong"] = runner(OBFUSCATIONS["blur-strong"]().eval())
    student = runs.get("student, ONNX fp32", runs["student, PyTorch fp32"])
    unseen = sample_frames(args.data, 6, 240, 320, 1, "test")
    cards["student"] = fidelity(student, runs["f_A, PyTorch fp32"], unseen)
    return runs, cards


def through_file(run, source: Path, out: Path) -> float:
    "Frames per second, video in, video out"
    start = time.perf_counter()
    entry = anonymize_file(source, out, FrameAnonymizer(run, "benchmark"), Options(batch=4, force=True))
    if entry["status"] != "done": raise RuntimeError(f"{source.name}: {entry['reason'] or entry['notes']}")
    return entry["frames_out"]/(time.perf_counter() - start)


def through_memory(run, frames, seconds=1.0) -> float:
    "Frames per second, one batch of 4 after the other"
    run(frames[:4])
    n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or n == 0:
        run(frames[:4])
        n += 4
    return n/(time.perf_counter() - start)


def only_decode(source: Path) -> float:
    "Frames per second, decoding alone"
    start = time.perf_counter()
    n = sum(1 for _ in decode_frames(source))
    return n/(time.perf_counter() - start)


def only_encode(frames: list, out: Path) -> float:
    "Frames per second, encoding alone"
    start = time.perf_counter()
    writer = VideoWriter(out, ".mp4", frames[0].info)
    for frame in frames: writer.write(frame)
    writer.close()
    return len(frames)/(time.perf_counter() - start)


def wanted(name): return not args.only or any(o in name for o in args.only)


class Meter:
    "Collects frame rates; a row that fails once is named in `failed` and left out from then on"
    def __init__(self, size: str, failed: dict):
        self.size, self.failed, self.found = size, failed, {}

    def add(self, row: str, kind: str, measure):
        "One more measurement of a row: `measure()` gives frames per second"
        key = f"{row} at {self.size}"
        if key in self.failed: return
        try: fps = measure()
        except Exception as e:
            reason = " ".join(f"{type(e).__name__}: {getattr(e, 'stderr', '') or e}".split())[-300:]
            self.failed[key] = reason
            print(f"{self.size}  {row:22} failed: {reason}", flush=True)
            return
        self.found.setdefault(row, {}).setdefault(kind, []).append(round(fps, 2))
        print(f"{self.size}  {row:22} {kind:6} {fps:8.1f} fps", flush=True)

    def add_matmul(self, row: str, before: float, after: float):
        "The machine's rate around a measurement of a row"
        if row in self.found: self.found[row].setdefault("matmul", []).append(round((before + after)/2, 1))


def measure(size: str, runs: dict, tmp: Path, failed: dict) -> dict:
    """row -> {'model': [fps, ...], 'file': [fps, ...]}; failures are added to `failed`.
    f_A's rows have 'matmul' too: the machine's rate in GFLOP/s just before and after each, because it may vary by a
    factor of two between minutes."""
    w, h = map(int, size.split("x"))
    count = max(16, min(args.frames, args.frames*320*240//(w*h)))
    source, few, out = clip(tmp/f"{size}.mp4", w, h, count), clip(tmp/f"{size}-few.mp4", w, h, 5), tmp/"out.mp4"
    decoded = list(decode_frames(source))
    frames, meter = np.stack([frame.rgb for frame in decoded[:4]]), Meter(size, failed)
    python = deface_python(Path(args.deface)) if args.deface and wanted("deface") else ""

    def deface():
        "Without its start"
        return (count - 5)/max(1e-3, deface_seconds(python, source, out) - deface_seconds(python, few, out))

    for _ in range(args.rounds):
        for row, run in runs.items():
            if not wanted(row): continue
            # convolutions of a GPU run in TF32 or bfloat16: no one rate to compare with
            kind = TYPES.get(row) if DEVICE == "cpu" else None
            before = kind and matmul_rate(kind)
            meter.add(row, "model", partial(through_memory, run, frames))
            if kind: meter.add_matmul(row, before, matmul_rate(kind))
            meter.add(row, "file", partial(through_file, run, source, out))
        if python: meter.add("deface", "file", deface)
        meter.add("decode only", "file", partial(only_decode, source))
        meter.add("encode only", "file", partial(only_encode, decoded, out))
    return meter.found


def table(results: dict) -> str:
    "Markdown: best of all rounds"
    sizes = list(results)
    lines = ["| frames per second | " + " | ".join(f"{s} model | {s} file" for s in sizes) + " |",
             "|---" * (1 + 2*len(sizes)) + "|"]
    for row in dict.fromkeys(r for s in sizes for r in results[s]):
        best = [max(results[s].get(row, {}).get(kind, [0])) for s in sizes for kind in ("model", "file")]
        lines.append(f"| {row} | " + " | ".join(f"{b:.1f}" if b else "" for b in best) + " |")
    return "\n".join(lines)


def against_flops(f_A, results: dict) -> dict:
    """What f_A reaches of the frame rate that its FLOPs and a large matrix product, measured around it, allow:
    in every round, and the median"""
    out = {}
    for size, found in results.items():
        w, h = map(int, size.split("x"))
        cost = 2*count_gmacs(f_A, h, w)
        out[size] = {"gflop": round(cost, 2)}
        for row in TYPES:
            if "matmul" not in found.get(row, {}): continue
            reached = [round(fps*cost/rate, 3) for fps, rate in zip(found[row]["model"], found[row]["matmul"])]
            out[size][row] = {"reached": reached, "median": round(statistics.median(reached), 3)}
    return out


def processor() -> str:
    "The name of the CPU"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main():
    began, cpu = os.getloadavg(), processor()
    f_A, results, failed = load_anonymizer(args.model)[0], {}, {}
    device = torch.cuda.get_device_name() if DEVICE.startswith("cuda") else cpu
    with tempfile.TemporaryDirectory() as folder:
        runs, cards = networks(Path(folder))
        for size in args.sizes:
            results[size] = measure(size, runs, Path(folder), failed)
            report = {"device": device, "cpu": cpu, "cores": args.cores, "torch": torch.__version__,
                      "av": av.__version__, "frames": args.frames, "date": str(date.today()),
                      "load": [began, os.getloadavg()], "f_A": against_flops(f_A, results), "cards": cards,
                      "failed": failed, "fps": results}
            if args.out: write_json(args.out, report)
            if args.markdown: Path(args.markdown).write_text(table(results) + "\n")
    print(f"\n{table(results)}\n\nf_A against its FLOPs: {report['f_A']}\ncards: {cards}")
    print(f"load before {began}, after {os.getloadavg()}")
    if failed: sys.exit("failed: " + "; ".join(f"{k} ({v})" for k, v in failed.items()))


main()
