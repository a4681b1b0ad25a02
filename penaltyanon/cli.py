"""The command line: thin. Whatever is slow to import is imported where it is used."""
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help="Anonymize people in video so that their actions stay recognizable, and measure both.")
MANY = ("--B", "--seeds", "--lam", "--methods", "--set")   # options that take several values
OWN = dict(B="--B", lam="--lam", seed="--seeds", method="--methods", preset="--preset")

Bounds = Annotated[list[float], typer.Option("--B", help="bounds of the penalty: --B 0.3 0.5, or --B 0.3,0.5")]
Jobs = Annotated[int, typer.Option(min=1, help="runs at a time")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of each run; 0: the library's choice")]
PAPER_B = [0.3, 0.5, 0.7, 0.9]


def spread(argv: list[str]) -> list[str]:
    "`--B 0.3 0.5` and `--B 0.3,0.5` as typer wants them: `--B 0.3 --B 0.5`"
    out, name, given = [], "", True
    for arg in argv:
        option, _, value = arg.partition("=")
        if option in MANY:
            out += [] if given else [name]
            name, given, arg = option, False, value
            if not value: continue
        elif arg.startswith("-") and not arg[1:2].isdigit() and not arg[1:2] == ".": out, name, given = out + ([] if given else [name]), "", True
        parts = [arg] if name in ("", "--set") else [p for p in arg.split(",") if p]
        out += [a for p in parts for a in ([name, p] if name else [p])]
        given = True
    return out if given else out + [name]


def assignments(pairs: list[str]) -> dict:
    "`key=value` settings; values as YAML reads them"
    import yaml
    from penaltyanon.core import UsageError
    for p in pairs:
        if "=" not in p: raise UsageError(f"--set {p}: write key=value, e.g. --set steps=500")
        if (name := p.partition("=")[0]) in OWN: raise UsageError(f"--set {p}: has an option of its own, {OWN[name]}")
    return {k: yaml.safe_load(v) for k, _, v in (p.partition("=") for p in pairs)}


def run_grid(cells: list, out: Path, jobs: int, threads: int) -> list:
    "Data first, then the jobs"
    from penaltyanon.sweep import prepare_data, run_jobs
    prepare_data(cells[0])
    return run_jobs(cells, out, jobs=jobs, threads=threads)


def show_table(root: Path):
    "The closing table"
    from rich.console import Console
    from rich.table import Table
    from penaltyanon.report import load_results, table
    rows = table(load_results(root))
    columns = [c for c in rows.columns if not c.startswith("F1")]
    grid = Table("", *columns, box=None, pad_edge=False)
    for label, *values in rows[columns].itertuples(): grid.add_row(str(label), *map(str, values))
    Console(width=None if sys.stdout.isatty() else 150).print(grid)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the runs and the report")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="folder of the puppets; made when missing")] = Path("data/puppets"),
    seeds: Annotated[int, typer.Option(min=1, help="how many: 0, 1, ...")] = 1,
    B: Bounds = PAPER_B, jobs: Jobs = 2, threads: Threads = 1,
    preset: Annotated[str, typer.Option(help="settings to start from")] = "demo",
):
    "The main job on generated data: puppets, controls, every B, figures, report.html."
    from penaltyanon.sweep import grid, raise_failed
    cells = grid(preset, B=B, seeds=range(seeds), action_data=f"puppets:{data}", privacy_data=f"puppets-images:{data}")
    todo = run_grid(cells, out, jobs, threads)
    if any(j.state in ("done", "kept") for j in todo):
        from penaltyanon.report import write_report
        page = write_report(out, jobs=jobs)
        show_table(out)
        print(f"report: {page}")
    raise_failed(todo)


@app.command()
def sweep(
    preset: Annotated[str, typer.Option(help="settings to start from: smoke, demo, mini, paper")] = "demo",
    action_data: Annotated[str, typer.Option(help="loader:folder, e.g. ucf101:/data/UCF-101; else the preset's")] = "",
    privacy_data: Annotated[str, typer.Option(help="loader:folder, e.g. vispr1:/data/vispr; else the preset's")] = "",
    attributes: Annotated[str, typer.Option(help="private attributes of the action clips (CSV or the official pickle)")] = "",
    B: Bounds = PAPER_B,
    seeds: Annotated[list[int], typer.Option(help="one full set of runs each: --seeds 0 1 2")] = [0],
    lam: Annotated[list[float], typer.Option(help="weights of the penalty; else the preset's")] = [],
    methods: Annotated[list[str], typer.Option(help="raw oracle lambda0 penalty; else all that the data allow")] = [],
    set_: Annotated[list[str], typer.Option("--set", help="any setting: --set steps=500 size=112")] = [],
    action_model: Annotated[str, typer.Option(help="f_T: a name, or path/file.py:builder")] = "",
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default runs/PRESET")] = None,
    jobs: Jobs = 2, threads: Threads = 1,
):
    "The grid of controls, B and seeds; finished runs are not redone."
    from penaltyanon.sweep import grid, raise_failed
    named = dict(action_data=action_data, privacy_data=privacy_data, attributes=attributes, action_model=action_model)
    overrides = {k: v for k, v in named.items() if v} | assignments(set_)
    cells = grid(preset, methods=methods or None, B=B, seeds=seeds, lam=lam or None, **overrides)
    out = out or Path("runs")/preset
    todo = run_grid(cells, out, jobs, threads)
    if any(j.state in ("done", "kept") for j in todo): show_table(out)
    raise_failed(todo)
    print(f"runs: {out}   next: penaltyanon report {out}")


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="folder of finished runs")],
    out: Annotated[Path | None, typer.Option(help="the page; default RUNS/report.html")] = None,
    jobs: Jobs = 2,
):
    "Figures and tables of finished runs on one page."
    from penaltyanon.report import write_report
    page = write_report(runs, out, jobs=jobs)
    show_table(runs)
    print(f"report: {page}")


@app.command()
def puppets(
    root: Annotated[Path, typer.Argument(help="folder to make")],
    train: Annotated[int, typer.Option(min=1, help="training clips")] = 400,
    test: Annotated[int, typer.Option(min=1, help="test clips")] = 160,
    seed: Annotated[int, typer.Option(min=0)] = 0,
):
    "Generate the embedded data set: acting puppets with known truth."
    from penaltyanon.puppets import write_puppets
    print(write_puppets(root, train=train, test=test, seed=seed))


def version(wanted: bool):
    "Print the version and leave"
    if wanted:
        from penaltyanon import __version__
        print(__version__)
        raise typer.Exit()


@app.callback()
def options(show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="print the version")] = False): pass


def main(argv: list[str] | None = None):
    "Run a command; what a user can mend is one line on stderr and exit code 1 (failure) or 2 (usage)"
    try: code = app(spread(sys.argv[1:] if argv is None else argv), standalone_mode=False, prog_name="penaltyanon")
    except (KeyboardInterrupt, typer.Abort): code = 130; print("stopped; finished runs are kept, start again to go on", file=sys.stderr)
    except Exception as e:
        if getattr(e, "exit_code", None) is None: raise
        code, message = e.exit_code, e.format_message() if hasattr(e, "format_message") else str(e)
        print(message if type(e).__name__ == "NoArgsIsHelpError" else f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code or 0)


if __name__ == "__main__": main()
