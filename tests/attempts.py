"""A server that runs notebooks in forked children, so that a test can kill an attempt without paying for imports each time.

One JSON line in: {"notebooks": [...], "parameters": {...}, "log": path, "die_at": n or null}; the child's pid comes back at once, its exit
status when it is over. `die_at` kills the child with SIGKILL at its n-th flush to the disk or rename: in the middle of writing a file."""
import json, multiprocessing, os, signal, sys, warnings
os.environ.setdefault("OMP_NUM_THREADS", "1")
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot, pandas, torch, torch.utils.tensorboard
from penaltyanon import attacks, datasets, evaluation, methods, puppets, report, sweep, training
torch.set_num_threads(1)


def mortal(n):
    "Let the n-th flush or rename be the last thing that this process begins."
    left = [n]
    def before(call):
        def go(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return go
    os.fsync, os.replace = before(os.fsync), before(os.replace)


def attempt(notebooks, parameters, log, die_at):
    "What papermill would do: the cells in order, the parameters after the tagged cell."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1); os.dup2(out, 2)
    warnings.simplefilter("ignore")
    if die_at: mortal(die_at)
    for path in notebooks:
        space = {"__name__": "__main__", "display": print}
        for cell in json.load(open(path))["cells"]:
            if cell["cell_type"] != "code": continue
            exec(compile("".join(cell["source"]), path, "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []): space |= parameters


def notebook(path, parameters, log):
    "The same for one notebook in a process of conftest's fork server."
    multiprocessing.set_start_method(None, force=True)       # as in a fresh interpreter: workers of a DataLoader are not to come from the fork server
    attempt([path], parameters, log, None)


if __name__ == "__main__":
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            code = 1
            try: attempt(**json.loads(line)); code = 0
            except BaseException as e: print(f"{type(e).__name__}: {e}", flush=True)
            finally: os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
