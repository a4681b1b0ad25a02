"""A sweep of 1,000 jobs without training: fake work that crashes, hangs and is preempted, two sweeps on one folder, one of them killed.

    python tools/simulate_sweep.py --jobs 1000 --out docs/simulated_sweep.json

Everything but the work is real: the queue, its locks, its retries, its watchdog. A job that is done leaves one line in `done/`; at the end
every job must have exactly one. Then, side by side: what the queue costs for each of as many jobs that do not fail, and what papermill costs."""
import argparse, json, os, platform, random, signal, statistics, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path

import nbformat

from penaltyanon.core.files import UserError, write_json
from penaltyanon.core.machine import die_with_parent
from penaltyanon.core.settings import resolve
from penaltyanon.sweep.jobs import ALREADY_DONE, LocalResources, run_jobs
from penaltyanon.sweep.notebooks import run_notebook, wait_for_process

RATES = dict(crash=0.10, hang=0.03, preempted=0.10)     # of attempts
WATCHDOG_S = 1.0
DIES = {"crash": "exit 1", "hang": "sleep 600", "preempted": "kill -9 $$"}


def fake_steps(root: Path, rates: dict, draw: random.Random):
    "A unit of work for `run_jobs`: a small shell that works, or comes to one of the ends of `rates`"
    def run_steps(job):
        job.path.mkdir(parents=True, exist_ok=True)
        fate = draw.random()
        for end, share in rates.items():
            if (fate := fate - share) < 0: break
        else: end = ""
        work = DIES.get(end) or f'echo done >> "{root}/done/{job.path.name}" && : > "{job.path}/DONE"'
        process = subprocess.Popen(["sh", "-c", f': > "{job.path}/begun-$$" ; {work}' if end != "hang" else work], start_new_session=True, preexec_fn=die_with_parent)
        hung = yield from wait_for_process(process, lambda: end != "hang", WATCHDOG_S)
        if hung or process.returncode: raise UserError(f"{end or process.returncode}")
    return run_steps


def make_grid(n: int): return [resolve("smoke", method="raw", seed=i) for i in range(n)]


def sweep(root: Path, n: int, seed: int, rates: dict, at_once: int = 8):
    "One sweep; whatever fails is tried again until it works"
    settings = make_grid(n)
    random.Random(seed).shuffle(settings)                  # two sweeps seldom want the same job at the same moment; here they do now and then
    todo = run_jobs(settings, root, LocalResources(at_once, gpus=()), notebooks=(), retries=50, poll_s=0.005,
                    run_steps=fake_steps(root, rates, random.Random(seed)))
    assert {j.state for j in todo} <= {"done", ALREADY_DONE}, [j.reason for j in todo if j.state == "failed"]
    return sum(j.tries for j in todo)


def worker(root: Path, n: int, seed: int): return subprocess.Popen([sys.executable, __file__, "--worker", str(root), "--jobs", str(n), "--seed", str(seed)], stderr=subprocess.DEVNULL)


def simulate(root: Path, n: int, kill_after: float = 0.3) -> dict:
    "Two sweeps on one folder; the first is killed when a share of the jobs is done, and started again"
    (root/"done").mkdir(parents=True)
    began, pair = time.monotonic(), [worker(root, n, 1), worker(root, n, 2)]
    while len(os.listdir(root/"done")) < kill_after * n and pair[0].poll() is None: time.sleep(0.01)
    killed = pair[0].poll() is None
    pair[0].send_signal(signal.SIGKILL); pair[0].wait()
    pair[0] = worker(root, n, 3)
    codes = [p.wait() for p in pair]
    lines = [(root/"done"/f).read_text().count("done") for f in os.listdir(root/"done")]
    attempts = sum(1 for _ in root.glob("*/begun-*"))
    return dict(jobs=n, done_exactly_once=sum(k == 1 for k in lines), done_twice=sum(k > 1 for k in lines), lost=n - len(lines), attempts_begun=attempts,
                rates=RATES, watchdog_s=WATCHDOG_S, sweeps=2, sweep_killed=killed, exit_codes=codes, seconds=round(time.monotonic() - began, 1))


def overhead(root: Path, n: int) -> float:
    "Milliseconds for each job of a sweep in which nothing fails, beyond the fake work itself"
    began = time.monotonic()
    for _ in range(50): subprocess.run(["sh", "-c", f': > "{root}/x"; echo done >> "{root}/x"'], start_new_session=True)
    alone = (time.monotonic() - began) / 50
    (root/"clean"/"done").mkdir(parents=True)
    began = time.monotonic()
    sweep(root/"clean", n, 0, {}, at_once=1)
    return 1e3 * ((time.monotonic() - began) / n - alone)


def papermill(root: Path, times: int = 5) -> float:
    "Median seconds of an empty notebook through papermill"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]})],
                   metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), root/"empty.ipynb")
    took = []
    for i in range(times):
        began = time.monotonic(); run_notebook(root/"empty.ipynb", {}, root/f"out{i}.ipynb"); took.append(time.monotonic() - began)
    return statistics.median(took)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--jobs", type=int, default=1000); p.add_argument("--out", default=""); p.add_argument("--worker", default=""); p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.worker: sweep(Path(args.worker), args.jobs, args.seed, RATES); sys.exit()
    with tempfile.TemporaryDirectory() as d:
        said = simulate(Path(d)/"runs", args.jobs)
        said |= dict(queue_ms_per_job=round(overhead(Path(d), args.jobs), 1), papermill_s_per_notebook=round(papermill(Path(d)), 2), notebooks_per_job=2,
                     date=str(date.today()), machine=f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}")
    print(json.dumps(said, indent=1))
    if args.out: write_json(args.out, said)
    sys.exit(said["done_exactly_once"] != args.jobs)
