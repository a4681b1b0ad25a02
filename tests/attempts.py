"""Attempts at notebooks in forked processes (the fixture `processes`), so that a test can kill one without paying for imports each time."""
import json, multiprocessing, os, signal, warnings
import matplotlib, torch


def die_at_flush(n):
    "Let the n-th flush or rename be the last thing that this process begins: killed with SIGKILL in the middle of writing a file."
    left = [n]
    def before(call):
        def go(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return go
    os.fsync, os.replace = before(os.fsync), before(os.replace)


def run_attempt(notebooks, parameters, log, die_at=None):
    "What papermill would do: the cells in order, the parameters after the tagged cell."
    multiprocessing.set_start_method(None, force=True)       # as in a fresh interpreter: workers of a DataLoader are not to come from the fork server
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1); os.dup2(out, 2)
    warnings.simplefilter("ignore")
    matplotlib.use("Agg"); torch.set_num_threads(1)
    if die_at: die_at_flush(die_at)
    for path in notebooks:
        space = {"__name__": "__main__", "display": print}
        for cell in json.load(open(path))["cells"]:
            if cell["cell_type"] != "code": continue
            exec(compile("".join(cell["source"]), path, "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []): space |= parameters
