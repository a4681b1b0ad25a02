"""How many frames a second: f_A in PyTorch and ONNX, its student, a blur, and deface, on the same two files, in one run.

    python tools/benchmark_throughput.py anonymizer.safetensors --student student.safetensors --deface /tmp/deface --out throughput.json

All rows take turns, so that a busy machine is unfair to nobody; the table shows the best of all rounds and the JSON each of them. A row that fails is
named with its reason, in the JSON too, and the exit code is 1; the other rows are measured all the same.
`model` is frames in memory to frames in memory; `file` is video in, video out, with decoding and encoding, without starting the program.
10 to 15 minutes on two idle cores. deface (PyPI, CenterFace) is installed by pip into a folder of its own, together with the onnxruntime that makes it fast."""
import argparse, os, platform, statistics, subprocess, sys, tempfile, time, venv
from datetime import date
from fractions import Fraction
from pathlib import Path


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="f_A, *.safetensors")
    p.add_argument("--student", default="", help="its student, *.safetensors; else one is distilled here")
    p.add_argument("--steps", type=int, default=1000, help="of distilling, when no student is given")
    p.add_argument("--data", default="", help="frames for distilling and for calibrating int8, loader:folder; else drawn ones")
    p.add_argument("--deface", default="", help="folder of an environment with deface; made when missing; '' leaves deface out")
    p.add_argument("--sizes", nargs="+", default=["320x240", "1280x720"], help="WxH")
    p.add_argument("--frames", type=int, default=100, help="in a file of 320x240; fewer in larger ones, at least 16")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--cores", type=int, default=2)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu or cuda; on a GPU only what PyTorch runs there is measured")
    p.add_argument("--only", nargs="+", default=[], help="rows whose names contain one of these")
    p.add_argument("--out", default="", help="JSON with every number; written after each size, so that what is measured is kept")
    p.add_argument("--markdown", default="", help="the table, as it is printed")
    return p.parse_args()


args = arguments()
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:args.cores]))      # deface inherits it
os.environ["OMP_NUM_THREADS"] = str(args.cores)
import av, numpy as np, torch
from penaltyanon.nets import student as _
from penaltyanon.edge.anonymize import Options, anonymize_file
from penaltyanon.nets.anonymizers import load_anonymizer
from penaltyanon.core.files import write_json
from penaltyanon.edge.command import pick_device, torch_runner
from penaltyanon.train.distill import distill, fidelity, count_gmacs, sample_frames
from penaltyanon.edge.export import export_onnx, onnx_anonymizer, probe_frames, torch_anonymizer
from penaltyanon.edge.guards import FrameAnonymizer
from penaltyanon.nets.obfuscation import OBFUSCATIONS
from penaltyanon.edge.streams import StreamInfo, Frame, VideoWriter, decode_frames
from penaltyanon.core.machine import has_fast_bf16

torch.set_num_threads(args.cores)
DEVICE = pick_device(args.device)
BF16 = has_fast_bf16(torch.device(DEVICE))       # else it is emulated, and no row
TYPES = {"f_A, PyTorch fp32": torch.float32, "f_A, PyTorch bf16": torch.bfloat16, "f_A, ONNX fp32": torch.float32}      # rows that are compared with matrix products
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)


def clip(path: Path, width: int, height: int, frames: int) -> Path:
    "A generated film: a drawn scene that the camera pans across, with noise; H.264"
    wide, rng = probe_frames(1, height, 2*width)[0], np.random.default_rng(0)
    writer = VideoWriter(path, ".mp4", StreamInfo(width, height, Fraction(25), Fraction(1, 25)))
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
        start = time.perf_counter(); a @ a
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
def networks(tmp: Path) -> tuple[dict, dict]:
    "The functions, and what their files' cards say"
    path = args.student or str(tmp/"student.safetensors")
    if not args.student: distill(args.model, path, args.data, args.steps)
    (f_A, _), frames = load_anonymizer(args.model), sample_frames(args.data, 12, 240, 320)
    runs, cards = {"f_A, PyTorch fp32": runner(f_A)}, {}
    if BF16: runs["f_A, PyTorch bf16"] = bf16(load_anonymizer(args.model)[0])
    runs["student, PyTorch fp32"] = runner(load_anonymizer(path)[0])
    for name, model in {"f_A": args.model, "student": path}.items() if DEVICE == "cpu" else ():
        for precision in ("fp32", "int8"):
            row = f"{name}, ONNX {precision}"
            cards[row] = export_onnx(model, tmp/f"{name}-{precision}.onnx", precision, frames=frames, traced=tmp/f"{name}-fp32.onnx" if precision == "int8" else None)["difference"]
            runs[row] = onnx_anonymizer(tmp/f"{name}-{precision}.onnx", threads=args.cores)
    runs["blur-strong"] = runner(OBFUSCATIONS["blur-strong"]().eval())
    cards["student"] = fidelity(runs.get("student, ONNX fp32", runs["student, PyTorch fp32"]), runs["f_A, PyTorch fp32"], sample_frames(args.data, 6, 240, 320, 1, "test"))
    return runs, cards


def through_file(run, source: Path, out: Path) -> float:
    "Frames per second, video in, video out"
    start = time.perf_counter()
    entry = anonymize_file(source, out, FrameAnonymizer(run, "benchmark"), Options(batch=4, force=True))
    if entry["status"] != "done": raise RuntimeError(f"{source.name}: {entry['reason'] or entry['notes']}")
    return entry["frames_out"]/(time.perf_counter() - start)


def through_memory(run, frames, seconds=1.0) -> float:
    "Frames per second, one batch of 4 after the other"
    run(frames[:4]); n, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or n == 0: run(frames[:4]); n += 4
    return n/(time.perf_counter() - start)


def only_decode(source: Path) -> float:
    start = time.perf_counter(); n = sum(1 for _ in decode_frames(source))
    return n/(time.perf_counter() - start)


def only_encode(pictures: list, out: Path) -> float:
    start = time.perf_counter(); writer = VideoWriter(out, ".mp4", pictures[0].info)
    for p in pictures: writer.write(p)
    writer.close()
    return len(pictures)/(time.perf_counter() - start)


def wanted(name): return not args.only or any(o in name for o in args.only)


def measure(size: str, runs: dict, tmp: Path, failed: dict) -> dict:
    """row -> {'model': [fps, ...], 'file': [fps, ...]}; a row that fails once is named in `failed` and left out from then on.
    f_A's rows have 'matmul' too: the machine's rate in GFLOP/s just before and after each, because it may vary by a factor of two between minutes."""
    w, h = map(int, size.split("x"))
    count = max(16, min(args.frames, args.frames*320*240//(w*h)))
    source, few, out = clip(tmp/f"{size}.mp4", w, h, count), clip(tmp/f"{size}-few.mp4", w, h, 5), tmp/"out.mp4"
    pictures = list(decode_frames(source))
    frames, found = np.stack([p.rgb for p in pictures[:4]]), {}
    python = deface_python(Path(args.deface)) if args.deface and wanted("deface") else ""
    def add(row, kind, fps):
        if f"{row} at {size}" in failed: return
        try: fps = fps()
        except Exception as e:
            failed[f"{row} at {size}"] = said = " ".join(f"{type(e).__name__}: {getattr(e, 'stderr', '') or e}".split())[-300:]
            return print(f"{size}  {row:22} failed: {said}", flush=True)
        found.setdefault(row, {}).setdefault(kind, []).append(round(fps, 2))
        print(f"{size}  {row:22} {kind:6} {fps:8.1f} fps", flush=True)
    def deface(): return (count - 5)/max(1e-3, deface_seconds(python, source, out) - deface_seconds(python, few, out))   # without its start
    for _ in range(args.rounds):
        for row, run in runs.items():
            if not wanted(row): continue
            kind = TYPES.get(row) if DEVICE == "cpu" else None      # convolutions of a GPU run in TF32 or bfloat16: no one rate to compare with
            before = kind and matmul_rate(kind)
            add(row, "model", lambda: through_memory(run, frames))
            if kind and row in found: found[row].setdefault("matmul", []).append(round((before + matmul_rate(kind))/2, 1))
            add(row, "file", lambda: through_file(run, source, out))
        if python: add("deface", "file", deface)
        add("decode only", "file", lambda: only_decode(source))
        add("encode only", "file", lambda: only_encode(pictures, out))
    return found


def table(results: dict) -> str:
    "Markdown: best of all rounds"
    sizes = list(results)
    lines = ["| frames per second | " + " | ".join(f"{s} model | {s} file" for s in sizes) + " |", "|---" * (1 + 2*len(sizes)) + "|"]
    for row in dict.fromkeys(r for s in sizes for r in results[s]):
        best = [max(results[s].get(row, {}).get(kind, [0])) for s in sizes for kind in ("model", "file")]
        lines.append(f"| {row} | " + " | ".join(f"{b:.1f}" if b else "" for b in best) + " |")
    return "\n".join(lines)


def against_flops(f_A, results: dict) -> dict:
    "What f_A reaches of the frame rate that its FLOPs and a large matrix product, measured around it, allow: in every round, and the median"
    out = {}
    for size, found in results.items():
        w, h = map(int, size.split("x"))
        cost = 2*count_gmacs(f_A, h, w)
        shares = {row: [round(fps*cost/rate, 3) for fps, rate in zip(found[row]["model"], found[row]["matmul"])] for row in TYPES if "matmul" in found.get(row, {})}
        out[size] = {"gflop": round(cost, 2)} | {row: {"reached": s, "median": round(statistics.median(s), 3)} for row, s in shares.items()}
    return out


def main():
    began, cpu = os.getloadavg(), next((l.split(":")[1].strip() for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")), platform.machine())
    f_A, results, failed = load_anonymizer(args.model)[0], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        runs, cards = networks(Path(folder))
        for size in args.sizes:
            results[size] = measure(size, runs, Path(folder), failed)
            report = {"device": torch.cuda.get_device_name() if DEVICE.startswith("cuda") else cpu, "cpu": cpu, "cores": args.cores, "torch": torch.__version__, "av": av.__version__, "frames": args.frames, "date": str(date.today()), "load": [began, os.getloadavg()],
                      "f_A": against_flops(f_A, results), "cards": cards, "failed": failed, "fps": results}
            if args.out: write_json(args.out, report)
            if args.markdown: Path(args.markdown).write_text(table(results) + "\n")
    print(f"\n{table(results)}\n\nf_A against its FLOPs: {report['f_A']}\ncards: {cards}\nload before {began}, after {os.getloadavg()}")
    if failed: sys.exit("failed: " + "; ".join(f"{k} ({v})" for k, v in failed.items()))


main()
