"""From bench/results/repulsion.csv: the table in the README, between its two marks, and a figure per device.

    python bench/report.py [--results FOLDER] [--readme FILE] [--print]

The newest row of each case and provider counts, on every processor and every GPU.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from forde_fast.benchmark import SHAPES
from forde_fast.timing import read

HERE = Path(__file__).parent
BEGIN, END = "<!-- table by bench/report.py -->", "<!-- end of the table -->"
NAMES = {"reference": "plain PyTorch", "compiled": "torch.compile", "cpp": "C++", "triton": "Triton",
         "cuda": "CUDA C++", "floor": "floor"}  # fmt: skip
COLOURS = {"reference": "#8c8c8c", "compiled": "#d98c21", "cpp": "#1f6fb4", "triton": "#1f6fb4", "cuda": "#1a7f37",
           "floor": "black"}  # fmt: skip
LENGTHSCALES = {"identity": "identity", "pca": "full PCA", "rank256": "PCA of rank 256"}
HARDWARE = {"cpu": "cpu", "cuda": "gpu"}  # what a row calls it, by device
BASE = {"M": 10, "B": 128, "D": 3072}
AXES = {"M": "M, members", "B": "B, samples of a batch", "D": "D, inputs"}


def machines(rows: list[dict], device: str) -> list[str]:
    """Every processor or GPU, the one that ran last behind the others."""
    names = [row[HARDWARE[device]] for row in rows if row["device"] == device]
    return list(dict.fromkeys(reversed(names)))[::-1]


def newest(rows: list[dict], device: str, machine: str) -> dict[tuple, dict]:
    """(M, B, D, lengthscale) -> provider -> its newest row: float32, cold cache, on this machine, and for each case
    of the run that was last, so that what stands side by side was measured together."""
    rows = [row for row in rows if row["device"] == device and row["dtype"] == "float32" and row["cache"] != "warm"]
    cases: dict[tuple, dict] = {}
    for row in rows:
        if row[HARDWARE[device]] == machine:
            case = (*(int(row[size]) for size in "MBD"), row["lengthscale"])
            found = cases.setdefault(case, {})
            run = row["commit"], row["floor_ms"]  # a run has one floor
            if any((other["commit"], other["floor_ms"]) != run for other in found.values()):
                found.clear()
            found[row["provider"]] = row
    return cases


def table(cases: dict[tuple, dict], device: str) -> str:
    """Markdown: what was measured on, then one line for each case of a named shape."""
    named = {c: found for c, found in cases.items() if c[:3] in SHAPES.values() and c[3] in LENGTHSCALES}
    if not named:
        return ""
    order = {shape: place for place, shape in enumerate(SHAPES.values())}
    named = dict(sorted(named.items(), key=lambda item: (order[item[0][:3]], item[0][3])))
    fast = [p for p in ("cpp", "triton", "cuda") if any(p in found for found in named.values())]
    head = ["M × B × D", "lengthscale", *(f"{NAMES[p]}, ms" for p in ("reference", "compiled", *fast)), "floor, ms"]
    head += [f"{NAMES[p]} / floor" for p in fast] + ["asked"]
    lines = [head, ["---"] * len(head)]
    for case, found in named.items():
        some = next(iter(found.values()))
        cells = [" × ".join(f"{size:,}" for size in case[:3]), LENGTHSCALES[case[3]]]
        cells += [_digits(found[p]["ms"]) if p in found else "—" for p in ("reference", "compiled", *fast)]
        cells += [f"{_digits(some['floor_ms'])} ({some['floor']})"]
        cells += [_digits(found[p]["ratio"]) if p in found else "—" for p in fast]
        cells += [
            next(
                (found[p]["target"].replace(" x floor", "") for p in fast if p in found and found[p].get("target")),
                "",
            )
        ]
        lines.append(cells)
    return _measured_on(named, device) + "\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _measured_on(cases: dict[tuple, dict], device: str) -> str:
    rows = [row for found in cases.values() for row in found.values()]
    last = max(rows, key=lambda row: row["time"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in sorted(rows, key=lambda row: row["time"])))
    hardware = f"{last['gpu']}, products in {last['precision']}, cold cache" if device == "cuda" else last["cpu"]
    versions = f"torch {last['torch']}" + (f", triton {last['triton']}" if device == "cuda" else "")
    return f"{hardware}; {versions}; commit {commits}; {last['time'][:10]}:"


def _digits(number: str) -> str:
    """Three digits, and all of those before the point."""
    value = float(number)
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def rewrite(readme: Path, text: str, begin: str = BEGIN) -> None:
    """Put the text between the two marks of the file; ValueError where they are not there once each."""
    whole = readme.read_text(encoding="utf-8")
    block = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    if len(block.findall(whole)) != 1:
        raise ValueError(f"readme: expected one block from '{begin}' to '{END}', got another number in {readme}")
    readme.write_text(block.sub(lambda _: f"{begin}\n{text}\n{END}", whole), encoding="utf-8")


def draw(cases: dict[tuple, dict], device: str, path: Path):
    """Time against M, B and D (rows) for each lengthscale (columns), with the floor; a PNG. Returns the Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.subplots(len(AXES), len(LENGTHSCALES), sharey="col")
    shown = {}
    for row, axis in zip(grid, AXES, strict=True):
        for axes, kind in zip(row, LENGTHSCALES, strict=True):
            axes.set(xscale="log", yscale="log", xlabel=AXES[axis])
            shown |= _draw_lines(axes, _along(cases, axis, kind))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    for axes, kind in zip(grid[0], LENGTHSCALES, strict=True):
        axes.set_title(LENGTHSCALES[kind])
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    names = [name for name in NAMES if name in shown]
    figure.legend(
        [shown[name] for name in names], [NAMES[name] for name in names], loc="outside lower center", ncols=6
    )
    fixed = ", ".join(f"{size} = {value}" for size, value in BASE.items())
    figure.suptitle(
        f"Value and gradient, float32; {fixed} but for the size on the axis\n" + _measured_on(cases, device)[:-1]
    )
    figure.savefig(path, format="png", dpi=110)
    return figure


def _along(cases: dict[tuple, dict], axis: str, kind: str) -> dict[str, list[tuple[int, float, float, float]]]:
    """provider -> its points (size, ms, ms_20, ms_80) along one axis through BASE."""
    lines: dict[str, list] = {}
    for case, found in sorted(cases.items()):
        sizes = dict(zip("MBD", case[:3], strict=True))
        if case[3] != kind or any(sizes[other] != BASE[other] for other in BASE if other != axis):
            continue
        for name, row in found.items():
            lines.setdefault(name, []).append((sizes[axis], *(float(row[key]) for key in ("ms", "ms_20", "ms_80"))))
        floor = float(next(iter(found.values()))["floor_ms"])
        lines.setdefault("floor", []).append((sizes[axis], floor, floor, floor))
    return lines


def _draw_lines(axes, lines: dict[str, list]) -> dict:
    drawn = {}
    for name, points in lines.items():
        size, middle, low, high = zip(*points, strict=True)
        style = {"linestyle": "--", "linewidth": 1} if name == "floor" else {"marker": "o", "markersize": 4}
        (drawn[name],) = axes.plot(size, middle, color=COLOURS[name], **style)
        axes.fill_between(size, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
    if lines:
        sizes = sorted({point[0] for points in lines.values() for point in points})
        axes.set_xticks(sizes, [f"{size}" for size in sizes], fontsize=8)
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    return drawn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--print", action="store_true", help="print the table and leave the README alone")
    given = parser.parse_args(arguments)
    rows = read(given.results / "repulsion.csv")
    cases = {device: [newest(rows, device, name) for name in machines(rows, device)] for device in HARDWARE}
    tables = [table(found, device) for device, all_found in cases.items() for found in all_found]
    text = "\n\n".join(part for part in tables if part)
    if given.print:
        print(text)
    else:
        rewrite(given.readme, text)
    for device, found in cases.items():
        if found:
            draw(max(found, key=len), device, given.results / f"repulsion_{device}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
