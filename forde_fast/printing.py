"""What the command line prints: what a run has loaded, tables of scores and what their columns are."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import sys
from collections.abc import Sequence

from forde_fast.types import Prediction

METRICS = {"accuracy": "A", "nll": "NLL", "ece": "ECE"}  # in tables as the paper has them: A, cA, cNLL, ...
PREFIX = {"clean": "", "validation": "v", "corrupted": "c", "corrupted_all": "a", "corrupted_grey": "g"}
LEGEND = {
    "clean": "no prefix: clean test images",
    "validation": "v: validation images",
    "corrupted": "c: mean over the 15 standard corruptions at the 5 severities of CIFAR-10-C",
    "corrupted_all": "a: the same over all 19, as the paper averages",
    "corrupted_grey": "g: mean over the 4 that have harder severities for grey images, at these",
}
MOST = 6  # classes that are named


def version() -> str:
    try:
        return importlib.metadata.version("forde-fast")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def loaded(run) -> str:
    """What a run trains and tests on, in a line that shows what was misunderstood."""
    shape, classes = list(run.images.shape[1:]), run.data.classes
    of = (
        f"{shape[0]} features"
        if run.data.table
        else f"{shape[0]} x {shape[1]} {'RGB' if len(shape) == 3 else 'grey'}"
    )
    held = f", {len(run.valid_images):,} validation" if len(run.valid_labels) else ""
    counts = f"{len(run.images):,} training{held}, {len(run.test_images):,} test samples"
    text = f"{run.config.data}: {counts} of {of}, {len(classes)} classes ({_first(classes)})"
    kind = "samples" if run.data.table else "images"
    for part, labels in (("training", run.labels), ("test", run.test_labels)):
        there = set(labels.tolist())
        missing = [name for label, name in enumerate(classes) if label not in there]
        text += f"; no {part} {kind} of: {_first(missing)}" if missing else ""
    return text


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST]) + (", ..." if len(names) > MOST else "")


def scores(results: dict[str, dict]) -> None:
    """A table of the methods' metrics."""
    shown = [group for group in PREFIX if all(group in metrics for metrics in results.values())]
    head = ("method", *(PREFIX[group] + short for group in shown for short in METRICS.values()))
    rows = []
    for name, metrics in results.items():
        found = [(metric, metrics[group][metric]) for group in shown for metric in METRICS]
        rows.append((name, *(f"{100 * s:.1f}" if metric == "accuracy" else f"{s:.3f}" for metric, s in found)))
    table("Accuracy in %, negative log-likelihood, calibration error of the ensemble's mean", head, rows)
    for group in shown:
        print(legend(group, next(iter(results.values()))))
    for name, metrics in results.items():
        for unknown, found in metrics.get("ood", {}).items():
            total, epistemic = (
                "AUROC {auroc:.3f}, FPR95 {fpr95:.3f}".format(**found[k]) for k in ("total", "epistemic")
            )
            print(f"{name} against {unknown}: {total} by total, {epistemic} by epistemic uncertainty")


def legend(group: str, metrics: dict) -> str:
    """What a group's columns are: of files, means over what these have."""
    from forde_fast.data.corruptions import CORRUPTIONS, HARDER, STANDARD

    wanted = {"corrupted": STANDARD, "corrupted_all": CORRUPTIONS, "corrupted_grey": HARDER}.get(group)
    if wanted is None:
        return LEGEND[group]
    scored = metrics["corrupted_grey" if group == "corrupted_grey" else "corrupted"]
    found, images = scored["by_corruption"], scored.get("images")
    names = [name for name in wanted if name in found] or list(found)
    text = LEGEND[group]
    if len(names) < len(wanted):
        harder = ", at the severities for grey images" if group == "corrupted_grey" else ""
        text = f"{PREFIX[group]}: mean over {', '.join(names)} alone{harder}"
    return text if images is None else f"{text}; {images:,} images each"


def predictions(names: Sequence[str], found: Prediction, classes: Sequence[str], as_json: bool) -> None:
    """For each image its class by the members' mean, and the uncertainties in nats."""
    mean, doubt = found.mean, (found.total, found.aleatoric, found.epistemic)
    rows = zip(names, mean.argmax(1).tolist(), mean.tolist(), *(own.tolist() for own in doubt), strict=True)
    if as_json:
        keys = ("total", "aleatoric", "epistemic")
        shown = [
            {"image": name, "class": classes[best], "probabilities": dict(zip(classes, own, strict=True))}
            | dict(zip(keys, rest, strict=True))
            for name, best, own, *rest in rows
        ]
        print(json.dumps(shown, indent=1))
        return
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(("image", "class", "probability", "total", "epistemic"))
    for name, best, own, total, _, epistemic in rows:
        lines.writerow((name, classes[best], f"{own[best]:.4f}", f"{total:.4f}", f"{epistemic:.4f}"))


def against(results: dict[str, dict]) -> None:
    """What the table shows, in words: the other methods beside the deep ensemble."""
    from forde_fast.experiments.summary import signed

    group = "corrupted" if all("corrupted" in metrics for metrics in results.values()) else "clean"
    for name, short in (("nll", "NLL"), ("ece", "ECE"), ("accuracy", "A")):
        base, size = results["de"][group][name], 100 if name == "accuracy" else 1
        apart = {n: signed(size * (m[group][name] - base), 2) for n, m in results.items() if n != "de"}
        shown, better = ", ".join(f"{n} {text}" for n, text in apart.items()), "higher" if size > 1 else "lower"
        print(f"{PREFIX[group]}{short} beside de ({better} is better): {shown}")
    print("All from one seed: forde-fast reproduce trains over several and gives intervals.")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    own = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(head):
        own.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        own.add_row(*row)
    Console(soft_wrap=True, width=100).print(own)  # no cell is cut on a terminal of 80 columns
