"""One page for many runs: tables in the paper's form and figures, as HTML in one file, Markdown, and PNGs."""

from __future__ import annotations

import base64
import functools
import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from forde_fast import config as configuration
from forde_fast import plots
from forde_fast.config import FIELDS
from forde_fast.data import Images, load
from forde_fast.doctor import read_log
from forde_fast.evaluation.metrics import BINS
from forde_fast.experiments import figures, summary
from forde_fast.files import make_folder, write
from forde_fast.methods import NAMES
from forde_fast.run import open_run
from forde_fast.validation import expect

POINTS = 60  # of a trace
FEW = 10  # samples of which no accuracy is drawn
TRACES = ("cross_entropy", "bandwidth_median", "gradient_cosine", "gradient_ratio")
ALIKE = (
    "data", "image_size", "train_size", "test_size", "model", "width", "members", "epochs", "lr", "batch_size",
    "augment",
)  # fmt: skip
CAPTIONS = {  # of the figures, by their files
    "severity.png": "Means over corruptions and seeds; severity 0 is the clean images. Beside them what is gained "
    "over the deep ensemble, paired by seed where the seeds are the same.",
    "reliability.png": "Clean test images of all seeds together, in bins by confidence, with the accuracy where a "
    f"bin has {FEW} images or more: above the diagonal the ensemble is right more often than it says.",
    "training.png": "Means over seeds, on the batches of training. R is the repulsion and w its weight; their "
    "gradient is measured in one of ten steps with repulsion.",
    "cost.png": "Diversity of the trained members on clean test images, and the speed of training. Of several seeds, "
    "the first table has the deviation of single runs, and the figures intervals of means.",
}
STYLE = """body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:right;white-space:nowrap}td:first-child,th:first-child{text-align:left}img{max-width:100%}
table{display:block;overflow-x:auto}"""  # a wide table is moved, not the page


class Found(NamedTuple):
    """A finished run: its row in the table, folder, settings and metrics."""

    row: str
    folder: Path
    config: dict
    metrics: dict


def report(folders: Sequence[str | Path], out: str | Path, data_dir: str | None = None) -> Path:
    """Write index.html, report.md and figures into `out`; returns the page.

    folders  of runs, or that hold runs (as `reproduce` and `compare` leave them), unfinished ones among them are left
             out. Raises FileNotFoundError for one without a run.
    """
    runs = [found for folder in folders for found in collect(Path(folder))]
    out = make_folder(out)
    rows = as_rows(runs)
    title = f"Report\n\n{_settings(runs)}"
    parts = [(summary.as_markdown(rows, title) if _comparable(rows) else summary.plain(rows, title)).rstrip()]
    pictures = {
        "Accuracy against severity": ("severity.png", lambda path: _severity(runs, path)),
        "Reliability": ("reliability.png", lambda path: _reliability(runs, path, data_dir)),
        "Training": ("training.png", lambda path: _traces(runs, path)),
        "Diversity and throughput": ("cost.png", lambda path: _cost(runs, path)),
    }
    for title, (name, draw) in pictures.items():
        note = draw(out / name)
        parts.append(f"## {title}\n\n" + (note or f"{CAPTIONS[name]}\n\n![{title}]({name})"))
    text = "\n\n".join(parts) + "\n"
    write(out / "report.md", text.encode())
    write(out / "index.html", as_html(text, out).encode())
    return out / "index.html"


def collect(folder: Path) -> list[Found]:
    """The finished runs in a folder, itself or below it; tuning runs, which have no test scores, are left out."""
    paths = sorted(folder.rglob("metrics.json"), key=lambda path: [_natural(part) for part in path.parts])
    expect(len(paths) > 0, "run", "a folder with finished runs", folder, FileNotFoundError)
    found = []
    for path in paths:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if "clean" in metrics and (path.parent / "config.toml").is_file():
            settings = configuration.read(path.parent / "config.toml")
            seeded = path.parent.name.startswith("seed") and path.parent != folder
            row = path.parent.parent.name if seeded else settings["method"]
            found.append(Found(row, path.parent, settings, metrics))
    expect(len(found) > 0, "run", "runs with scores on test images", folder, FileNotFoundError)
    return found


def as_rows(runs: Sequence[Found]) -> dict:
    """What `summary` makes tables of, methods in the package's order and runs in that of their seeds."""
    rows: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: run.config.get("seed", 0)):
        setting = {name: run.config.get(name, configuration.FIELDS[name].default)
                   for name in ("weight_decay", "repulsion_weight", "alpha")}  # fmt: skip
        empty = {"method": run.config["method"], "setting": setting, "metrics": [], "seeds": []}
        row = rows.setdefault(run.row, empty)
        row["metrics"].append(run.metrics)
        row["seeds"].append(run.config.get("seed", 0))

    def place(row: str) -> tuple:  # several rows of one method by their names, "-published" after the tuned one
        return row != "de", NAMES.index(rows[row]["method"]), _natural(row)

    return {row: rows[row] for row in sorted(rows, key=place)}


def _settings(runs: Sequence[Found]) -> str:
    """How the runs were trained, so far as they agree."""
    values = {name: {run.config.get(name, FIELDS[name].default) for run in runs} for name in ALIKE}
    shared = [f"{name.replace('_', ' ')} {own}" for name, (own, *others) in values.items() if not others and own]
    differing = [name.replace("_", " ") for name, own in values.items() if len(own) > 1]
    text = f"All runs: {', '.join(shared)}."
    return text + (f" They differ in {', '.join(differing)}." if differing else "")


def _comparable(rows: dict) -> bool:
    """Whether there is a deep ensemble, and the same seeds in every row."""
    return "de" in rows and len({tuple(row["seeds"]) for row in rows.values()}) == 1


def _by_row(runs: Sequence[Found]) -> dict[str, list[Found]]:
    """In the order of the table, runs in that of their seeds."""
    rows: dict[str, list[Found]] = {row: [] for row in as_rows(runs)}
    for run in sorted(runs, key=lambda run: run.config.get("seed", 0)):
        rows[run.row].append(run)
    return rows


def _severity(runs: Sequence[Found], path: Path) -> str:
    """Mean over corruptions and seeds, the clean images as severity 0; beside it what is gained over "de"."""
    panels: dict[str, dict] = {}
    seeds = {row: own["seeds"] for row, own in as_rows(runs).items()}
    for group, title in (("corrupted", "CIFAR-10-C's severities"), ("corrupted_grey", "preset for grey images")):
        found = {
            row: np.array([[_at_severity(run, group, severity) for severity in range(6)] for run in own])
            for row, own in _by_row(runs).items()
            if all("by_corruption" in run.metrics.get(group, {}) for run in own)
        }
        if found:
            panels[f"accuracy [%], {title}"] = {row: _line(values) for row, values in found.items()}
        if "de" in found and len(found) > 1:
            de = found["de"]
            panels[f"points above de, {title}"] = {
                row: _line(values - de if seeds[row] == seeds["de"] else (values.mean(0) - de.mean(0))[None])
                for row, values in found.items()
            }
    if not panels:
        return "No run was scored on corrupted images."
    figures.curves(panels, path, "severity", range(6))
    return ""


def _at_severity(run: Found, group: str, severity: int) -> float:
    """Accuracy in %."""
    if severity == 0:
        return 100 * run.metrics["clean"]["accuracy"]
    by_name = run.metrics[group]["by_corruption"].values()
    return 100 * statistics.fmean(own[str(severity)]["accuracy"] for own in by_name if str(severity) in own)


def _line(values: np.ndarray) -> tuple:
    """Of numbers [seeds, severities]: the severities, means and half widths of the means' intervals."""
    return range(values.shape[1]), *zip(*map(summary.interval, values.T), strict=True)


def _reliability(runs: Sequence[Found], path: Path, data_dir: str | None) -> str:
    """Of the clean test images, those of all seeds of a row together: the members are read and asked again."""
    bins = {}
    try:
        for row, own in _by_row(runs).items():
            found = _predicted(own, data_dir)
            confidence, accuracy, share = reliability_bins(*found)
            rare = share * len(found[0]) < FEW
            bins[row] = (confidence, np.where(rare, np.nan, accuracy), share)
    except (OSError, ValueError) as error:
        return f"The images or members are not there: {error}"
    figures.reliability(bins, path)
    return ""


def _predicted(runs: Sequence[Found], data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of all test images, run after run."""
    confidences, correct = [], []
    for found in runs:
        name, folder = found.config.get("data", FIELDS["data"].default), data_dir or found.config.get("data_dir")
        data = _data(name, folder, found.config.get("image_size"))
        run = open_run(found.folder, data, corrupted_dir=None, ood=None)
        confidence, predicted = run.predict(run.test_images).mean(0).max(1)
        confidences.append(confidence.numpy())
        correct.append((predicted == run.test_labels).numpy())
    return np.concatenate(confidences), np.concatenate(correct)


@functools.lru_cache(maxsize=1)
def _data(name: str, folder: str | None, image_size: int | None) -> Images:
    return load(name, folder, image_size=image_size)


def reliability_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and share of the samples in bins (lo, hi] of equal width, NaN where empty."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(place, weights, BINS) / count for weights in (confidence, correct.astype(float))]
    return means[0], means[1], count / len(confidence)


def _traces(runs: Sequence[Found], path: Path) -> str:
    """Mean over seeds, at POINTS places of the training, or as many as there are measurements."""
    panels: dict[str, dict] = {}
    for row, own in _by_row(runs).items():
        logs = [read_log(run.folder) for run in own]
        for key in TRACES:
            found = [{step: value for step, value in plots.curve(log, key)} for log in logs]
            steps = np.array(sorted(set.intersection(*map(set, found))))
            if len(steps):
                steps = steps[np.unique(np.linspace(0, len(steps) - 1, POINTS).astype(int))]
                values = [statistics.fmean(own[step] for own in found) for step in steps]
                panels.setdefault(plots.CURVES[key], {})[row] = (steps, values)
    figures.curves(panels, path, "step")
    return ""


def _cost(runs: Sequence[Found], path: Path) -> str:
    """Diversity of the trained members on test images, where it was scored, and the speed of training; 95 % intervals
    over seeds."""
    panels: dict[str, dict] = {}
    for row, own in _by_row(runs).items():
        scored = [run.metrics["diversity"] for run in own if "diversity" in run.metrics]
        values = {
            "1 − cosine of the members' input gradients": [1 - one["gradient_cosine"] for one in scored],
            "disagreement of two members [% of images]": [100 * one["disagreement"] for one in scored],
            "deviation of the members' accuracies [points]": [
                100 * statistics.pstdev(member["accuracy"] for member in run.metrics["clean"]["members"])
                for run in own
            ],
            "training speed [members × images / s]": [run.metrics["members_x_images_per_second"] for run in own],
        }
        for title, numbers in values.items():
            if len(numbers) == len(own):
                panels.setdefault(title, {})[row] = summary.interval(numbers)
    figures.points(panels, path)
    return ""


def as_html(markdown: str, folder: Path) -> str:
    """The few forms of Markdown that a report has, with its pictures inside the page."""
    body, table = [], []
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        if table:
            body.append(_html_table(table))
            table = []
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            body.append(f"<h{level}>{html.escape(line[level:].strip())}</h{level}>")
        elif line.startswith("!["):
            title, name = line[2:-1].split("](")
            content = base64.b64encode((folder / name).read_bytes()).decode()
            body.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">')
        elif line:
            body.append(f"<p>{html.escape(line)}</p>")
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>Report</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(body)}</body></html>"


def _html_table(lines: Sequence[str]) -> str:
    rows = [[html.escape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
    cells = ["".join(f"<th>{cell}</th>" for cell in rows[0])]
    cells += ["".join(f"<td>{_bold(cell)}</td>" for cell in row) for row in rows[2:]]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _bold(cell: str) -> str:
    return f"<b>{cell[2:-2]}</b>" if cell.startswith("**") else cell


def _natural(part: str) -> tuple:
    """seed10 after seed9."""
    name = part.rstrip("0123456789")
    return name, int(part[len(name) :] or -1)
