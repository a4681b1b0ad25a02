"""Does a training end the same on other processors? One configuration, trained with instruction sets switched off.

    python tools/instruction_sets.py --seeds 0 1 --set size=32 frames=4 --out docs/instruction_sets.json

Each line is a process of its own that trains the demo without a penalty (lambda = 0), the configuration that once ended
as a constant picture on a machine with AMX. `none` leaves PyTorch, oneDNN and MKL only what every x86-64 processor has;
`bf16` computes f_A in bfloat16 as processors do that have it natively, here in software. Rounding differs in all of them,
and a minimax training amplifies it: what must agree is how it ends, within what seeds differ by. The numbers are f_T's
accuracy on held-out training clips, how far clips moved, and what is left of contrast and of the differences between
clips, all as train/minimax measures them.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

NATIVE = dict(ATEN_CPU_CAPABILITY="", ONEDNN_MAX_CPU_ISA="", MKL_ENABLE_INSTRUCTIONS="")
SETS = {
    "native": NATIVE,
    "avx2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "none": dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2"),
    "bf16": NATIVE}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--set", nargs="+", default=[], help="settings of the demo preset, name=value")
    p.add_argument("--data", default="data/puppets", help="puppets, made where they are missing")
    p.add_argument("--out", default="")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    return p.parse_args()


def settings_of(args, seed: int):
    "The demo without a penalty."
    from penaltyanon.cli import parse_assignments
    from penaltyanon.core.settings import NO_BOUND, resolve
    data = dict(action_data=f"puppets:{args.data}", privacy_data=f"puppets-images:{args.data}")
    return resolve("demo", **NO_BOUND, **data, **parse_assignments(args.set), seed=seed, threads=1)


def train_here(args, name: str, seed: int) -> dict:
    "In this process: train, and say how it ended."
    import torch
    from penaltyanon.core.run_folder import RunFolder
    from penaltyanon.sweep.grid import prepare_data
    from penaltyanon.train import batches, trainer
    torch.set_num_threads(1)
    if name == "bf16": batches.has_fast_bf16 = lambda device: True
    s = settings_of(args, seed)
    prepare_data(s)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(folder, s)
        _, record = trainer.train(run, *batches.load_collections(s), progress=False)
        last = [row for row in run.metrics() if row["stage"] == "minimax"][-20:]
    change = sum(row["rms_clips"] for row in last) / len(last)
    return dict(set=name, seed=seed, pytorch=torch.backends.cpu.get_cpu_capability(), rms_clips=change,
                recovered=record["recovered"], **record["health"])


def train_apart(args, name: str, seed: int) -> dict:
    "The same in a process that sees these instructions only."
    environment = {k: v for k, v in os.environ.items() if k not in NATIVE} | {k: v for k, v in SETS[name].items() if v}
    options = ["--set", *args.set] if args.set else []
    command = [sys.executable, __file__, "--child", f"{name}:{seed}", "--data", args.data, *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    if done.returncode: return dict(set=name, seed=seed, ended=lines[-1] if lines else "error")
    return json.loads(lines[-1])


if __name__ == "__main__":
    args = arguments()
    if args.child:
        name, seed = args.child.split(":")
        try: print(json.dumps(train_here(args, name, int(seed))))
        except Exception as error: raise SystemExit(print(f"{type(error).__name__}: {error}") or 1)
        raise SystemExit
    rows = []
    for seed in args.seeds:
        for name in args.sets:
            rows.append(train_apart(args, name, seed))
            print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if args.out:
        settings = dict(pair.split("=") for pair in args.set)
        result = dict(what="demo, lambda = 0, with instruction sets switched off", settings=settings, date=str(date.today()), rows=rows)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
