"""Figures: what an ensemble says of some images, and how its training went. PNG files, no global state."""

import unicodedata
from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np
import torch

from forde_fast import drawing
from forde_fast.evaluation import Array, as_labels, as_probs, uncertainty
from forde_fast.step import MEASURED, Log
from forde_fast.validation import expect

COLUMNS = 4
MOST_IMAGES = 64
LONGEST_NAME = 28  # letters that fit on an image's width, wide ones for two
RIGHT, WRONG, BAR, TRACK = "#1a7f37", "#c62828", "#9db8d2", "#eef1f4"

# key of the log -> title; drawn in this order
CURVES = {
    "cross_entropy": "cross-entropy, sum of members [nats]",
    "repulsion": "repulsion R",
    "bandwidth_median": "median squared distance",
    "gradient_cosine": "cosine between members' particles",
    "weight_entropy": "entropy of the repulsion weights p [nats]",
    "kernel_mean": "mean kernel between members",
    "gradient_ratio": "‖w ∇R‖ / ‖∇ cross-entropy‖, where measured",
}
DOTS = 60  # points up to which each is marked


def predictions(
    images: Array,
    labels: Array,
    probabilities: Array,
    classes: Sequence[str],
    path: str | PathLike,
    title: str = "",
):
    """Draw 1 to 64 images with what is predicted for them; save a PNG at `path` and return the Figure.

    images uint8 [n, H, W] or [n, H, W, C] with C 1 or 3, labels [n], classes K names, probabilities [n, K] or
    [M, n, K]. Each panel has the image's class, the prediction with its probability (green where right, red
    where wrong), the image, the total uncertainty in nats (see `evaluation.uncertainty`) and the three
    likeliest classes as bars from 0 to 1; with members, a dot for each and the epistemic uncertainty too. A class
    whose name has letters that no installed font has is drawn as "class 3".

    Raises TypeError for a wrong type or dtype, ValueError for wrong shapes or values, OSError as open does.
    """
    from matplotlib.figure import Figure

    pixels = _pixels(images)
    members = _member_probs(probabilities, len(pixels), len(classes))
    labels = as_labels(labels, len(pixels), len(classes)).tolist()
    nats = uncertainty(members)
    names = _drawable([str(name) for name in classes])

    columns = min(COLUMNS, len(pixels))
    rows = -(-len(pixels) // columns)
    note = len(members) > 1  # what the dots are
    heading, height = 0.01 + 0.5 * bool(title) + 0.2 * note, 4.0 * rows
    figure = Figure(figsize=(2.7 * columns, heading + height))
    header, body = figure.subfigures(2, 1, height_ratios=(heading, height))
    header.text(0.5, 0.6 if note else 0.5, title, fontsize=13, ha="center", va="center", wrap=True)
    if note:
        header.text(0.5, 0.1, "bars: mean over the members; dots: members", fontsize=8, ha="center")
    grid = body.add_gridspec(rows, columns)
    for i, image in enumerate(pixels):
        panel = body.add_subfigure(grid[i])
        caption = f"uncertainty {nats['total'][i]:.2f} nats"
        if len(members) > 1:
            caption += f", epistemic {nats['epistemic'][i]:.2f}"
        _draw_image(panel, image, caption)
        _draw_classes(panel, names, labels[i], members[:, i].double().numpy())
    drawing.save(figure, path)
    return figure


def training(log: Sequence[Mapping] | Mapping[str, Sequence[Mapping]], path: str | PathLike):
    """Draw a run's log over the steps, one small plot per quantity of CURVES; save a PNG, return the Figure.

    `log` is a list of records as in log.jsonl, each with "step" and any of CURVES' keys, or a dict name ->
    such a list to draw several runs over each other. Quantities that no run has are left out; those that span
    decades get a logarithmic axis. Numbers that a step did not measure, but has from an earlier one, are no points.

    Raises TypeError for another type, ValueError if no record has a step and one of the keys, OSError as open
    does.
    """
    from matplotlib.figure import Figure

    runs = log if isinstance(log, Mapping) else {"": log}
    for records in runs.values():
        known = isinstance(records, Sequence) and all(isinstance(record, Mapping) for record in records)
        kinds = "a list of dicts, or a dict of such lists"
        expect(known, "log", kinds, type(records).__name__, error=TypeError)
    curves = {key: {name: curve(records, key) for name, records in runs.items()} for key in CURVES}
    curves = {key: lines for key, lines in curves.items() if any(len(line) for line in lines.values())}
    expect(bool(curves), "log", f"records with step and one of {', '.join(CURVES)}", "none")

    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.7 * rows + 0.15 + 0.25 * -(-len(runs) // 4)), layout="constrained")
    for i, (key, lines) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, i + 1, sharex=figure.axes[0] if i else None)
        _draw_curves(axes, lines)
        axes.set_title(CURVES[key], fontsize=10)
    if len(runs) > 1:
        drawing.add_legend(figure, dict(zip(map(str, runs), axes.lines, strict=True)))
    drawing.save(figure, path)
    return figure


def _pixels(images: Array) -> np.ndarray:
    known = isinstance(images, torch.Tensor | np.ndarray)
    expect(known, "images", "a tensor or array", type(images).__name__, error=TypeError)
    pixels = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else images
    expect(pixels.dtype == np.uint8, "images", "uint8", images.dtype, error=TypeError)
    known = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3))
    expect(known, "images", "[n, H, W] or [n, H, W, C] with C 1 or 3", f"shape {list(pixels.shape)}")
    expect(pixels.size > 0, "images", "at least one of each of n, H, W", f"shape {list(pixels.shape)}")
    expect(len(pixels) <= MOST_IMAGES, "images", f"at most {MOST_IMAGES}", len(pixels))
    return pixels


def _member_probs(probabilities: Array, samples: int, classes: int) -> torch.Tensor:
    """Probabilities [n, K] or [M, n, K] as checked [M, n, K]."""
    members = getattr(probabilities, "ndim", 0) == 3
    probs = as_probs(probabilities, "probabilities", "M, n, K" if members else "n, K")
    expected, got = [samples, classes], list(probs.shape[-2:])
    expect(got == expected, "probabilities", f"[n, K] = {expected} as images and classes", got)
    return probs if members else probs[None]


def _draw_image(panel, image: np.ndarray, caption: str) -> None:
    """The image [H, W] or [H, W, C] in the middle of the panel, the caption below it."""
    axes = panel.add_axes((0.1, 0.34, 0.8, 0.53))
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_axis_off()
    panel.text(0.5, 0.3, caption, fontsize=8, ha="center")


def _draw_classes(panel, names: list[str], label: int, members: np.ndarray) -> None:
    """The true and the predicted class above the image, the likeliest as bars below it; members [M, K]."""
    mean = members.mean(0)
    top = np.argsort(-mean, kind="stable")[:3]
    right = top[0] == label
    panel.text(0.5, 0.935, f"true: {names[label]}", fontsize=9, ha="center")
    verdict = f"{'✓' if right else '✗'} {names[top[0]]}, {mean[top[0]]:.0%}"
    panel.text(0.5, 0.885, verdict, fontsize=9, ha="center", color=RIGHT if right else WRONG)

    axes = panel.add_axes((0.1, 0.03, 0.8, 0.255))
    rank = np.arange(len(top))
    axes.barh(rank, 1, height=0.35, color=TRACK)
    axes.barh(rank, mean[top], height=0.35, color=BAR)
    if len(members) > 1:
        axes.plot(members[:, top].T, rank, "o", color="black", markersize=3, alpha=0.5, markeredgewidth=0)
    for i, k in enumerate(top):
        axes.text(0, i - 0.3, names[k], fontsize=8)
        axes.text(1, i - 0.3, f"{mean[k]:.0%}", fontsize=8, ha="right")
    axes.set(xlim=(-0.02, 1.02), ylim=(2.4, -0.8))
    axes.set_axis_off()


def curve(records: Sequence[Mapping], key: str) -> np.ndarray:
    """The points [points, 2] of step and value at which `key` was measured.

    The other steps have the last measurement's numbers: all of those of a step without repulsion, MEASURED of most
    steps with it, too. They are known by the whole group of numbers repeating.
    """
    fields = MEASURED if key in MEASURED else [name for name in Log._fields[1:] if name not in MEASURED]
    points, before = [], None
    for record in records:
        if record.get("step") is not None and record.get(key) is not None:
            group = [record.get(name) for name in fields]
            if key not in fields or group != before:
                points.append((record["step"], record[key]))
            before = group
    return np.array(points, dtype=float).reshape(-1, 2)


def _drawable(names: list[str]) -> list[str]:
    """The names, cut to an image's width; "class 3" for one with letters that no installed font has."""
    known = drawing.fonts_for("".join(names))
    names = [name if all(letter in known for letter in name) else f"class {k}" for k, name in enumerate(names)]
    return [drawing.literal(_cut(name)) for name in names]


def _cut(name: str) -> str:
    """At most LONGEST_NAME wide, letters such as Chinese ones being twice as wide."""
    ends = np.cumsum([2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name])
    if not name or ends[-1] <= LONGEST_NAME:
        return name
    return name[: int((ends < LONGEST_NAME).sum())] + "…"


def _draw_curves(axes, lines: dict[str, np.ndarray]) -> None:
    for number, (name, line) in enumerate(lines.items()):
        marker = "o" if len(line) <= DOTS else None  # a single point would be an invisible line
        style = drawing.line_style(number, len(lines))
        axes.plot(line[:, 0], line[:, 1], label=name, marker=marker, markersize=2.5, **style)
    points = np.concatenate(list(lines.values()))
    drawing.set_scale(axes, points[:, 1])
    drawing.whole_ticks(axes.xaxis, points[:, 0])
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
