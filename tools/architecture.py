"""docs/architecture.svg, drawn from the imports: wings as floors, rooms as boxes, arrows from a wing to those it uses. Run by `make pages`."""
import ast
import re
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
WINGS = ("core", "data", "nets", "avatar", "edge", "train", "dp", "evaluate", "sweep", "results")     # from the ground up
SAYS = {
    "cli": "the command line",
    "results": "the paper's numbers, figures, tables, the report",
    "sweep": "grids of runs: papermill, a queue, SLURM, status",
    "evaluate": "fresh attackers, protocols, the door to any anonymizer",
    "dp": "masked differential privacy: tokens, accountants, training with a statement",
    "train": "losses, Algorithm 1, competing methods, the trainer",
    "avatar": "people found and followed, bodies in their place, no PyTorch",
    "edge": "real video without PyTorch: streams, guards, command, ONNX",
    "data": "readers, official data sets, generated puppets, checks",
    "nets": "f_A, f_T, f_B, closed-form methods, pretrained weights",
    "core": "files, machine, settings, run folder, checkpoints, shared",
}
FLOOR, LEFT, ROOM, WIDTH = 76, 250, 92, 1060     # pixels: height of a floor, where rooms begin, width of a room, of the picture


def rooms_of(wing: str) -> list[str]:
    "Rooms of a wing in the order of their numbers."
    return [p.stem.partition("_")[2] for p in sorted(ROOT.glob(f"nbs/{wing}/[0-9]_*.ipynb"))]


def imported_modules(source: str, package: tuple[str, ...]) -> set[str]:
    "Full names of what a module of `package` imports, anywhere in it; of `from a import b` both a and a.b."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return found


def wings_used(path: Path) -> set[str]:
    "Wings that a module imports from."
    package = path.relative_to(ROOT).parts[:-1]
    names = (m.split(".") for m in imported_modules(path.read_text(encoding="utf-8"), package))
    return {parts[1] for parts in names if parts[0] == "penaltyanon" and len(parts) > 1} & set(WINGS)


def arrows() -> Counter:
    "(wing, wing below) -> how many rooms of the first use the second."
    count = Counter()
    for wing in WINGS:
        for room in rooms_of(wing):
            count.update((wing, other) for other in wings_used(ROOT/"penaltyanon"/wing/f"{room}.py") if other != wing)
    count.update(("cli", other) for other in wings_used(ROOT/"penaltyanon"/"cli.py"))
    return count


def draw() -> str:
    "The picture as SVG text."
    floors = [*reversed(WINGS)]
    floors.insert(0, "cli")
    top = {wing: 20 + FLOOR * i for i, wing in enumerate(floors)}
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{40 + FLOOR * len(floors)}" font-family="sans-serif">',
           '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
           'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="#446"/></marker></defs>',
           '<rect width="100%" height="100%" fill="#fff"/>']
    for wing, y in top.items():
        out.append(f'<rect x="{LEFT - 130}" y="{y}" width="{WIDTH - LEFT + 110}" height="{FLOOR - 14}" rx="6" fill="#eef1f7"/>')
        out.append(f'<text x="{LEFT - 118}" y="{y + 26}" font-size="17" font-weight="bold" fill="#223">{wing}</text>')
        for i, room in enumerate(rooms_of(wing) if wing != "cli" else []):
            x = LEFT - 20 + (ROOM + 8) * i
            out.append(f'<rect x="{x}" y="{y + 8}" width="{ROOM}" height="26" rx="4" fill="#fff" stroke="#9ab"/>')
            out.append(f'<text x="{x + ROOM / 2:g}" y="{y + 25}" font-size="12" text-anchor="middle" fill="#223">{escape(room)}</text>')
        out.append(f'<text x="{LEFT - 20}" y="{y + 53}" font-size="12" fill="#667">{escape(SAYS[wing])}</text>')
    lane = 0
    for (wing, other), n in sorted(arrows().items(), key=lambda a: (floors.index(a[0][1]) - floors.index(a[0][0]), a[0])):
        start, end = top[wing] + 30, top[other] + 20
        bend = 118 - 12 * (floors.index(other) - floors.index(wing))
        shift = 3 * (lane % 3)
        out.append(f'<path d="M120 {start + shift}C{bend} {start + 12} {bend} {end - 12} 119 {end + shift}" fill="none" '
                   f'stroke="#446" stroke-opacity=".55" stroke-width="{0.6 + 0.3 * n:.1f}" marker-end="url(#head)"/>')
        lane += 1
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    target = ROOT/"docs"/"architecture.svg"
    target.write_text(draw(), encoding="utf-8")
    print(re.sub(r".*/", "", str(target)), "drawn")
