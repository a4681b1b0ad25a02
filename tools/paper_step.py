"""What one step of the `paper` preset costs at 224 pixels: seconds of one core and peak memory.

    python tools/paper_step.py --out docs/paper_step.json
    python tools/paper_step.py --project docs/paper_step.json     # what the paper's tables would take at this speed

Networks and sizes are the preset's; weights are random and the data are noise, which changes neither. A batch of 8 clips
does not fit into 23 GiB in float32, so that smaller batches are measured, each in a process of its own, and the preset's
batch is extrapolated from them: the file says which number is which. The other stages are measured for one sample each.
Seconds are CPU seconds of one thread; other work on the machine still slows them, so that its load stands beside them.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F

from penaltyanon.core.files import write_json
from penaltyanon.core.machine import has_fast_bf16
from penaltyanon.core.settings import resolve
from penaltyanon.evaluate.store import anonymized_frames
from penaltyanon.nets.anonymizers import freeze_batchnorm
from penaltyanon.train.batches import Batch
from penaltyanon.train.losses import l1_reconstruction
from penaltyanon.train.methods import make_anonymizer
from penaltyanon.train.minimax import anonymize_both, anonymizer_step, make_networks, recognizers_step

CLASSES = 101     # of UCF101


def cpu_seconds(work) -> float:
    "CPU seconds of this process, the second time that it does some work."
    work()
    began = time.process_time()
    work()
    return time.process_time() - began


def seconds_of_minimax(nets, s, n: int) -> float:
    "Both steps of Algorithm 1 on n clips and n images."
    clip = torch.rand(n, 3, s.frames, s.size, s.size)
    batch = Batch(clip, torch.zeros(n, dtype=torch.long), torch.rand(2*n, 3, s.size, s.size), torch.zeros(n, 0))
    def step():
        anonymizer_step(nets, batch, s)
        recognizers_step(nets, *anonymize_both(nets.f_A, batch, s), batch, s)
    return cpu_seconds(step)


def seconds_of_other_stages(nets, s) -> dict:
    "Seconds of one sample in each of the other stages."
    frames, clips = torch.rand(4, 3, s.size, s.size), torch.rand(2, 3, s.frames, s.size, s.size)
    labels = torch.zeros(2, dtype=torch.long)
    for net in (nets.f_A, nets.f_T, nets.f_B): net.train().requires_grad_(True)
    def learn(loss): loss().backward()
    def anonymize():
        with torch.no_grad(): nets.f_A(frames)
    return dict(
        identity_image=cpu_seconds(lambda: learn(lambda: l1_reconstruction(frames, nets.f_A(frames)))) / 4,
        anonymize_frame=cpu_seconds(anonymize) / 4,
        attack_clip=cpu_seconds(lambda: learn(lambda: F.cross_entropy(nets.f_T(clips), labels))) / 2,
        attack_image=cpu_seconds(lambda: learn(lambda: nets.f_B(frames).square().sum())) / 4)


def measure(n: int) -> dict:
    "In this process: a batch of n clips, or (n = 0) the other stages."
    torch.manual_seed(0)
    torch.set_num_threads(1)
    s = resolve("paper", precision="fp32", action_weights="", privacy_weights="")
    nets = make_networks(s, freeze_batchnorm(make_anonymizer(s)), CLASSES, torch.device("cpu"))
    return dict(clips=n, seconds=seconds_of_minimax(nets, s, n)) if n else seconds_of_other_stages(nets, s)


def measure_apart(n: int) -> dict:
    "The same in a process of its own, with its peak memory."
    command = [sys.executable, __file__, "--child", str(n)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    if status: raise SystemExit(f"error: a batch of {n} clips ended with {status}")
    row = json.loads(out)
    return row | dict(peak_gib=round(used.ru_maxrss / 2**20, 2)) if n else row


def extrapolate_seconds(rows: list[dict], clips: int) -> float:
    "Time in proportion to the batch."
    return round(clips * float(np.mean([row["seconds"] / row["clips"] for row in rows])), 1)


def extrapolate_memory(rows: list[dict], clips: int) -> float:
    "The straight line through the measured batches: weights and optimizers stay, activations grow."
    slope, start = np.polyfit([row["clips"] for row in rows], [row["peak_gib"] for row in rows], 1)
    return round(float(start + slope * clips), 1)


def processor() -> str:
    "The processor's name and its widest vectors."
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{model[0] if model else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


SETS = {   # training clips, test clips; VISPR1 has 10,000 training and 8,000 test images
    "ucf101": (9_537, 3_783), "hmdb51": (3_570, 1_530), "vp-hmdb51": (3_570, 1_530)}
TRAININGS = {   # of one seed
    "Tables 1, 2, 5 to 8, Figure 3: B = 0, 0.3, 0.5, 0.7, 0.9, 1": ("ucf101", 6),
    "Table 3: five further weights of the penalty": ("ucf101", 5),
    "Table 1, PA-HMDB51: four B": ("hmdb51", 4),
    "Tables 1 and 2, VP-HMDB51: four B": ("vp-hmdb51", 4)}


def project_run(measured: dict, data: str) -> dict:
    "Hours of one run in each stage, at the measured speed."
    s, unit, (train, test), images = resolve("paper"), measured["unit_seconds"], SETS[data], 10_000
    frames = anonymized_frames(s, (train, test), (images, 8_000))
    seconds = {
        "identity": 2 * images * s.identity_epochs * unit["identity_image"],
        "Algorithm 1": s.epochs * (train // s.batch_clips) * measured["seconds_per_step"],
        "anonymizing": frames * unit["anonymize_frame"],
        "f_T'": s.eval_seeds * s.eval_action_epochs * train * unit["attack_clip"],
        "f_B'": s.eval_seeds * s.eval_privacy_epochs * (images + train) * unit["attack_image"]}
    return {stage: value / 3600 for stage, value in seconds.items()}


def print_projection(measured: dict):
    "The tables of the paper, one seed; the identity is shared by the runs of a table."
    total = 0.0
    for table, (data, runs) in TRAININGS.items():
        hours = project_run(measured, data)
        shared = hours.pop("identity")
        total += shared + runs * sum(hours.values())
        stages = ", ".join(f"{stage} {h:,.0f} h" for stage, h in hours.items())
        print(f"{table}: {runs} runs of {sum(hours.values()):,.0f} h ({stages}), and {shared:,.0f} h of identity")
    print(f"together {total:,.0f} h of {measured['threads']} thread of this machine, for one seed: a projection, not a measurement")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clips", type=int, nargs="+", default=(2, 3), help="batches to measure")
    p.add_argument("--child", type=int, default=-1, help=argparse.SUPPRESS)
    p.add_argument("--project", default="", help="project the tables from this file instead of measuring")
    p.add_argument("--out", default="")
    args = p.parse_args()
    if args.project: raise SystemExit(print_projection(json.loads(open(args.project).read())))
    if args.child >= 0: raise SystemExit(print(json.dumps(measure(args.child))))
    s, rows, others = resolve("paper"), [measure_apart(n) for n in args.clips], measure_apart(0)
    result = dict(
        what="one iteration of Algorithm 1 under --preset paper, and one sample of each other stage; one thread, float32",
        size=s.size, frames=s.frames, batch_clips=s.batch_clips, precision="fp32", measured=rows,
        seconds_per_step=extrapolate_seconds(rows, s.batch_clips), peak_gib=extrapolate_memory(rows, s.batch_clips),
        extrapolated=["seconds_per_step", "peak_gib"], load=[round(x, 1) for x in os.getloadavg()],
        unit_seconds={name: round(value, 3) for name, value in others.items()}, device="cpu", threads=1,
        machine=processor(), native_bf16=has_fast_bf16(torch.device("cpu")), torch=torch.__version__,
        date=str(date.today()))
    print(json.dumps(result, indent=1))
    if args.out: write_json(args.out, result)
