"A real scheduler: one node of SLURM on the loopback interface, started for these tests."
import os, shutil, signal, socket, subprocess, time
from dataclasses import replace
from pathlib import Path
import pytest
from penaltyanon.sweep import grid, jobs
from penaltyanon.core.settings import run_name
from penaltyanon.sweep.cluster import ClusterResources, scheduler_id, read_queue, run_on_cluster, submit_jobs
from penaltyanon.core.files import unlock_file, read_json, read_rows
from penaltyanon.core.run_folder import RunFolder
from penaltyanon.sweep.status import cancel_runs, find_jobs
from test_resume import timeless

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
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
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
    cells = grid.expand_grid("smoke", B=(0.3, 0.5, 0.7), action_data=f"puppets:{lab}/d", privacy_data=f"puppets-images:{lab}/d", bootstrap=20, backbone="unet", decoder=[16])
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
    assert len(cancel_runs(root)) == 6
    wait_for(lambda: not set(read_queue()) & {scheduler_id(j) for j in todo}, "the end of the queue")
    assert {j.state for j in find_jobs(root)} == {"interrupted"}
