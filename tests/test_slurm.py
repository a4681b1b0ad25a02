"A real scheduler: one node of SLURM on the loopback interface, started for these tests."
import os, shutil, signal, socket, subprocess, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from penaltyanon.sweep import grid, jobs
from penaltyanon.core.settings import resolve, run_name
from penaltyanon.sweep.cluster import ClusterResources, scheduler_id, read_queue, run_on_cluster, submit_jobs
from penaltyanon.core.files import UserError, unlock_file, read_json, read_rows
from penaltyanon.core.run_folder import RunFolder, start_file
from penaltyanon.sweep.status import cancel_runs, find_jobs
from conftest import ROOT
from test_resume import timeless
from test_sweep import literals, notebook as write_notebook

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
found = {p: shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for p in PROGRAMS}
pytestmark = pytest.mark.skipif(None in found.values() or os.geteuid() != 0, reason="needs root and Debian's munge and slurm-wlm (missing: "
                                f"{', '.join(p for p, f in found.items() if not f) or 'nothing'}): apt-get install munge slurm-wlm")

CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={dir}/munge.socket
SlurmctldPort={ctl}
SlurmdPort={d}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=requeue_delay=0,sched_interval=1,bf_interval=1,batch_sched_delay=0,default_queue_depth=100
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
MinJobAge=30
SlurmctldTimeout=30
SlurmdTimeout=60
MailProg=/bin/true
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


def wait_for(fact, what, seconds=90):
    deadline = time.time() + seconds
    while not (value := fact()):
        assert time.time() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.2)
    return value


def started_under(conf):
    "Processes that this SLURM has started, by their environment."
    for f in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SLURM_CONF={conf}".encode() in f.read_bytes().split(b"\0"): yield int(f.parent.name)
        except OSError: continue


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, processes):
    "munged, slurmctld and slurmd in a folder of their own; ended with the tests. (`processes` comes first, or its server would be taken for SLURM's child.)"
    folder, daemons = tmp_path_factory.mktemp("slurm"), []
    for d in ("state", "spool"): (folder/d).mkdir()
    for part in [folder, *folder.parents][:-2]: os.chmod(part, 0o755)        # munged insists on who may write above its socket
    conf = folder/"slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], dir=folder, ctl=free_port(), d=free_port()))
    (folder/"gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")        # two GPUs that are none
    (folder/"munge.key").write_bytes(os.urandom(128)); os.chmod(folder/"munge.key", 0o400)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(conf)
    munge = [found["munged"], "-F", "-f", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munged.log"]
    for command in (munge, [found["slurmctld"], "-D", "-f", str(conf)], [found["slurmd"], "-D", "-f", str(conf)]):
        daemons.append(subprocess.Popen(command, stdout=open(folder/"out", "a"), stderr=subprocess.STDOUT, start_new_session=True))
        if command is munge: wait_for((folder/"munge.socket").exists, "munged")
    idle = lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout
    try:
        try: wait_for(idle, "an idle node", 60)
        except AssertionError as e: pytest.skip(f"SLURM does not come up here: {e}; {(folder/'out').read_text()[-500:]} {(folder/'slurmctld.log').read_text()[-300:] if (folder/'slurmctld.log').exists() else ''}")
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], timeout=30)
        for p in reversed(daemons): p.terminate()
        for p in reversed(daemons):
            try: p.wait(15)
            except subprocess.TimeoutExpired: p.kill()
        for pid in started_under(conf): os.kill(pid, signal.SIGKILL)       # steps that wait for a requeued job's ghosts
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    "Six runs of the smoke preset: every control, three bounds."
    lab = tmp_path_factory.mktemp("data")
    cells = grid.expand_grid("smoke", B=(0.3, 0.5, 0.7), action_data=f"puppets:{lab}/d", privacy_data=f"puppets-images:{lab}/d", bootstrap=20, backbone="unet", decoder=[16], identity_steps=60, identity_lr=1e-2)
    grid.prepare_data(cells[0])
    assert len(cells) == 6
    return [replace(s, steps=150, save_minutes=0.02) if s.B == 0.5 else s for s in cells]      # one minimax training long enough to be killed in


def claims(root, s):
    path = root/run_name(s)
    return timeless(read_json(path/"results.json")), [r for r in timeless(read_rows(path/"metrics.jsonl"))]


def test_a_sweep_through_slurm_with_a_job_killed_midway(slurm, cells, tmp_path, finish_attempt):
    "Six jobs in an array; one is killed in its minimax training and requeued by the scheduler; all results are those of the same notebooks without a scheduler."
    root, resources = tmp_path/"slurm", ClusterResources(jobs=2, options=dict(timeout_min=20, requeue=True))
    todo = jobs.make_jobs(cells, root)
    submit_jobs(todo, root, resources, retries=0)
    assert len({scheduler_id(j) for j in todo}) == 6 and submit_jobs(todo, root, resources) == {}, "what is queued is not submitted twice"
    victim = next(j for j in todo if j.settings.method == "penalty" and j.settings.B == 0.5)
    wait_for(lambda: any(r["stage"] == "minimax" and r["step"] > 10 for r in read_rows(victim.path/"metrics.jsonl")), "the minimax training of the victim", 400)
    assert not (victim.path/"anonymizer.safetensors").exists()
    subprocess.run(["scontrol", "requeue", scheduler_id(victim)], check=True)
    wait_for(lambda: read_queue().get(scheduler_id(victim)) == "PENDING" or (victim.path/"attempts").is_dir(), "the requeue")
    subprocess.run(["scontrol", "update", f"jobid={scheduler_id(victim)}", "StartTime=now"])      # SLURM lets a requeued job rest for two minutes
    done = run_on_cluster("slurm", cells, root, resources, retries=0)
    assert {j.state for j in done} <= {"done", "already done"}, [(j.path.name, j.reason) for j in done]
    assert list((victim.path/"attempts").glob("train_anonymizer-*.ipynb")), "the attempt that was killed is kept"
    assert len(read_json(victim.path/"env.json")["resumed"]) == 2, "the second attempt, and the evaluation"
    for s in cells:                                        # the same notebooks, without a scheduler
        finish_attempt(s, tmp_path/"local", tmp_path/"log")
        assert claims(root, s) == claims(tmp_path/"local", s), run_name(s)
    assert {j.state for j in run_on_cluster("slurm", cells, root)} == {"already done"} and {j.state for j in find_jobs(root)} == {"done"}


def test_a_queued_sweep_can_be_cancelled(slurm, cells, tmp_path):
    root = tmp_path/"runs"
    todo = jobs.make_jobs(cells, root)
    submit_jobs(todo, root, ClusterResources(jobs=1, options=dict(timeout_min=20, begin="now+1hour")))
    for j in todo: RunFolder.create(root, j.settings); unlock_file(j.path.parent/"_jobs"/f"{j.path.name}.writing.lock")
    assert {j.state for j in find_jobs(root)} == {"queued"}
    assert len(cancel_runs(root)) == 6 + 2, "the runs, and the data and the start that they wait for"
    wait_for(lambda: not set(read_queue()) & {scheduler_id(j) for j in todo}, "the end of the queue")
    assert {j.state for j in find_jobs(root) if j.path.is_dir()} == {"interrupted"}


# ---- a GPU node, whose GPUs are none: what is visible counts, and the CPU stands for them
TOY = """import os, time; from pathlib import Path
from penaltyanon.core.files import write_json
from penaltyanon.core.run_folder import RunFolder, start_file
from penaltyanon.core.settings import settings_from
s = settings_from(globals())
run = RunFolder.create(run_root, s, resume=True)
started = s.method == "raw" or start_file(run_root, s).exists()
run.finish(dict(gpus=os.environ.get("CUDA_VISIBLE_DEVICES", ""), started=started, workers=s.workers, time=time.time()))"""


@pytest.fixture
def toy(tmp_path):
    "A notebook that stands for training and evaluation: it writes down what it was given."
    return write_notebook(tmp_path/"toy.ipynb", literals(resolve("smoke")), TOY)


@pytest.fixture
def gpu_cells(tmp_path_factory):
    "Raw and a bound for each of two seeds, with a start that takes some seconds."
    lab = tmp_path_factory.mktemp("data")
    return grid.expand_grid("smoke", methods=("raw", "penalty"), B=(0.3,), seeds=(0, 1), cache=False, identity_steps=80, identity_target=0.0, save_minutes=0.02,
                            backbone="unet", decoder=[16], action_data=f"puppets:{lab}/d", privacy_data=f"puppets-images:{lab}/d")


def show_job(number):
    "What the scheduler knows of a job, by name."
    text = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def test_runs_wait_for_data_and_start_and_hold_no_gpu_meanwhile(slurm, gpu_cells, toy, tmp_path, monkeypatch):
    "Order, dependencies and GPUs of the jobs; one start is requeued by the scheduler while it is made, and the runs still wait for it."
    monkeypatch.setenv("PENALTYANON_CPU_AS_GPU", "1")
    root, resources = tmp_path/"runs", ClusterResources(jobs=2, gpus=1, options={"cpus-per-task": 1, "time": "0:20:00"})
    todo, task = jobs.make_jobs(gpu_cells, root, notebooks=(toy,)), dict(retries=0, notebooks=(toy,))
    submit_jobs(todo, root, resources, **task)
    first = [j for j in find_jobs(root) if j.path.name.startswith(("data-", "start-"))]
    assert [j.path.name[:5] for j in first] == ["data-", "start", "start"] and len(find_jobs(root)) == 3 + 4
    data, start, other = (show_job(scheduler_id(j)) for j in first)
    assert "gpu" not in data.get("TresPerNode", "") and data["Dependency"] in ("(null)", "")
    for job in (start, other): assert job["TresPerNode"].endswith("gpu:1") and data["JobId"] in job["Dependency"] and job["TimeLimit"] == "00:20:00"
    for j in todo:
        known, own = show_job(scheduler_id(j)), next(s for s in first if j.settings.seed == s.settings.seed and s.path.name.startswith("start"))
        assert known["TresPerNode"].endswith("gpu:1") and known["Requeue"] == "1" and known["NumCPUs"] == "1"
        waits = [name for name in (scheduler_id(first[0]), scheduler_id(own)) if f"afterok:{name}" in known["Dependency"]]
        assert len(waits) == (1 if j.settings.method == "raw" else 2), known["Dependency"]
    key = next(j for j in first if j.path.name.startswith("start") and j.settings.seed == 0)
    rows, requeued, seen = start_file(root, key.settings).with_suffix(".jsonl"), False, set()
    def all_over():
        nonlocal requeued
        running = {number for number, state in read_queue().items() if state == "RUNNING"}
        for j in todo:
            if scheduler_id(j) in running and j.settings.method != "raw": assert start_file(root, j.settings).exists(), "a run holds a GPU while its start is made"
        if not requeued and len(read_rows(rows)) > 5:
            subprocess.run(["scontrol", "requeue", scheduler_id(key)], check=True)
            requeued = True
        if requeued and read_queue().get(scheduler_id(key)) == "PENDING": subprocess.run(["scontrol", "update", f"jobid={scheduler_id(key)}", "StartTime=now"], capture_output=True)
        seen.update((j.path.name.partition("-")[0], j.state) for j in find_jobs(root))
        return all(jobs.is_finished(j) for j in todo)
    wait_for(all_over, "the end of all runs", 500)
    assert requeued and {("data", "running"), ("start", "queued"), ("start", "running"), ("penalty", "queued")} <= seen, seen
    results = {j.path.name: read_json(j.path/"results.json") for j in todo}
    assert all(r["gpus"] in ("0", "1") and r["started"] and r["workers"] == 0 for r in results.values()), results
    assert {j.state for j in find_jobs(root)} == {"done"} and submit_jobs(jobs.make_jobs(gpu_cells, root, notebooks=(toy,)), root, resources, **task) == {}


def test_a_failed_start_cancels_what_waits_and_the_same_command_mends_it(slurm, gpu_cells, toy, tmp_path, monkeypatch):
    monkeypatch.setenv("PENALTYANON_CPU_AS_GPU", "1")
    root, resources = tmp_path/"runs", ClusterResources(jobs=2, gpus=1, options=dict(cpus_per_task=1, timeout_min=20))
    cells, how = [s for s in gpu_cells if s.seed == 0 and s.method != "raw"], dict(retries=0, notebooks=(toy,))
    root.mkdir()
    (root/"_start").write_text("in the way")
    done = run_on_cluster("slurm", cells, root, resources, **how)
    assert {j.state for j in done} == {"failed"} and all("cancelled, because start-" in j.reason and "_start" in j.reason for j in done), [j.reason for j in done]
    states = {j.path.name.partition("-")[0]: (j.state, j.reason) for j in find_jobs(root)}
    assert states["data"][0] == "done" and states["start"][0] == "failed" and states["penalty"][0] == "cancelled" and "start-" in states["penalty"][1], states
    (root/"_start").unlink()
    assert {j.state for j in run_on_cluster("slurm", cells, root, resources, **how)} == {"done"}
    assert {j.state for j in find_jobs(root)} == {"done"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU to show")
def test_a_job_that_sees_no_gpu_fails_with_a_line_and_never_computes_on_the_cpu(slurm, gpu_cells, toy, tmp_path):
    cells = [s for s in gpu_cells if s.method == "raw"][:1]
    job, = run_on_cluster("slurm", cells, tmp_path/"runs", ClusterResources(gpus=1, options=dict(cpus_per_task=1, timeout_min=20)), retries=0, notebooks=(toy,))
    assert job.state == "failed" and "this job needs 1 GPU, PyTorch sees 0 here (CUDA_VISIBLE_DEVICES: " in job.reason, job.reason
    assert not (job.path/"DONE").exists()


def test_what_sbatch_refuses_is_one_line_and_nothing_stays_in_the_queue(slurm, gpu_cells, toy, tmp_path):
    before = read_queue()
    with pytest.raises(UserError, match="--cluster slurm: sbatch: error: .*; see --slurm") as e:
        run_on_cluster("slurm", gpu_cells[:1], tmp_path/"runs", ClusterResources(gpus=9, options=dict(cpus_per_task=1)), notebooks=(toy,))
    assert "\n" not in str(e.value)
    wait_for(lambda: set(read_queue()) <= set(before), "the end of what was submitted before the refusal")


@pytest.mark.parametrize("script", sorted((ROOT/"examples"/"slurm").glob("*.sbatch")), ids=lambda p: p.stem)
def test_a_batch_file_of_the_examples_is_one_that_sbatch_takes(slurm, script):
    "With this cluster's partition and CPUs in place of the site's; `--test-only` says when it would begin, and submits nothing."
    r = subprocess.run(["sbatch", "--test-only", "--partition=main", "--cpus-per-task=2", "--mem=500", str(script)], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0 and "to start at" in r.stderr, r.stderr
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0, "not a shell script"
