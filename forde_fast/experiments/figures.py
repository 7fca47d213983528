"""Figures of experiments and reports: PNG files, no global state. Each function saves at `path`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from forde_fast import drawing

COLUMNS = 3
DOTS = 20  # points up to which each is marked
INTERVALS = "means over seeds with their 95 % intervals (Student's t, which has no bounds)"


def curves(panels: Mapping[str, Mapping[str, tuple]], path: str | Path, xlabel: str, xticks: Sequence | None = None):
    """Lines: {title: {label: (x, y) or (x, y, half height of its 95 % intervals)}}, one legend for all panels."""
    handles, order = {}, list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure, grid = grid_of(len(panels), 3.8, 3.0, len(order))
    intervals = False
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        if axes is not grid[0]:
            axes.sharex(grid[0])  # one measured at few steps has the others' range
        drawn = []
        for label, (x, y, *error) in lines.items():
            number = order.index(label)  # the same colour in every panel
            bars = error[0] if error and np.isfinite(error[0]).all() else None
            beside = x
            if bars is not None and len(x) > 1:
                beside = np.asarray(x) + 0.06 * np.diff(x).min() * (number - (len(order) - 1) / 2)
            style = drawing.line_style(number, len(order)) | {"capsize": 2, "elinewidth": 0.8}
            marker = "o" if len(x) <= DOTS else None
            handles[label] = axes.errorbar(beside, y, bars, marker=marker, markersize=3, **style)
            half = _finite(0.0 if bars is None else bars)
            drawn += [np.asarray(y) - half, np.asarray(y) + half]
            intervals |= bool(half.any())
        drawing.set_scale(axes, np.concatenate(drawn))
        drawing.whole_ticks(axes.xaxis, [number for line in lines.values() for number in line[0]])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        if xticks is not None:
            axes.set_xticks(list(xticks))
    drawing.add_legend(figure, handles, INTERVALS if intervals else None)
    save(figure, path)


def points(panels: Mapping[str, Mapping[str, tuple]], path: str | Path):
    """A row each, a point with its bar: {title: {label: (mean, half width of its 95 % interval, or not finite)}}.

    Points, since values that are alike could not be told apart from 0 on, and bars from elsewhere mislead.
    """
    most = max(map(len, panels.values()))
    intervals = any(np.isfinite(half) for own in panels.values() for _, half in own.values())
    longest = max(len(label) for own in panels.values() for label in own)
    figure, grid = grid_of(len(panels), 3.6 + 0.07 * longest, 0.9 + 0.28 * most, int(intervals))
    for axes, (title, own) in zip(grid, panels.items(), strict=False):
        labels, place = list(own), np.arange(len(own))
        values, errors = (np.array([pair[i] for pair in own.values()], dtype=float) for i in (0, 1))
        style = {"color": drawing.COLOURS[0], "markersize": 4.5, "elinewidth": 1.2, "capsize": 2}
        drawn = axes.errorbar(values, place, xerr=_finite(errors), fmt="o", **style)
        axes.set_yticks(place, [drawing.literal(label) for label in labels])
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.locator_params(axis="x", nbins=5)  # for labels such as 0.0025
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.set_title(title, fontsize=10)
    if intervals:
        drawing.add_legend(figure, {INTERVALS: drawn})
    save(figure, path)


def _finite(errors: np.ndarray | float) -> np.ndarray:
    return np.where(np.isfinite(errors), errors, 0.0)


def reliability(bins: Mapping[str, tuple], path: str | Path):
    """{label: (confidence [bins], accuracy [bins], share of samples [bins])}, a panel each; empty bins are NaN."""
    figure, grid = grid_of(len(bins), 2.9, 3.0, 0)
    for axes, (label, (confidence, accuracy, share)) in zip(grid, bins.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, label="accuracy = confidence")
        width = 1 / len(confidence)
        middles = (np.arange(len(confidence)) + 0.5) * width
        height = np.asarray(share) / np.nanmax(share)
        axes.bar(middles, height, width, color="#e3e8ee", label="share of images (largest = 1)")
        style = {"color": drawing.COLOURS[0], "markersize": 3.5, "linewidth": 1.2, "clip_on": False}
        axes.plot(confidence, accuracy, "o-", label="accuracy", **style)
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(drawing.literal(label), fontsize=10)
        axes.set_xlabel("confidence", fontsize=9)
    drawing.add_legend(figure, dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)))
    save(figure, path)


def maps(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str], path: str | Path):
    """Images in a grid: {name of the row: [image [H, W] or [H, W, 3], ...]}, grey levels or colours of a map."""
    from matplotlib.figure import Figure

    height, width = len(rows), len(titles)
    figure = Figure(figsize=(1.25 * width + 1.3, 1.25 * height + 0.5), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray" if image.dtype == np.uint8 else "viridis")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    save(figure, path)


def grid_of(panels: int, width: float, height: float, labels: int):
    from matplotlib.figure import Figure

    columns = 2 if panels == 4 else min(COLUMNS, panels)
    rows = -(-panels // columns)
    legend = 0.25 * -(-labels // 4)
    figure = Figure(figsize=(width * columns, height * rows + legend + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[panels:]:
        axes.set_axis_off()
    for axes in grid[:panels]:
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawing.save(figure, path)
