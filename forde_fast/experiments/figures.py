"""Figures of experiments and reports: PNG files, no global state. Each function saves at `path`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

COLUMNS = 3
STYLES = ("-", "--", ":", "-.")  # after ten colours the same ones come again, broken


def curves(panels: Mapping[str, Mapping[str, tuple]], path: str | Path, xlabel: str, xticks: Sequence | None = None):
    """Lines: {title: {label: (x, y) or (x, y, half height of its error bars)}}, one legend for all panels."""
    figure, grid = grid_of(len(panels), 3.8, 3.0, len({label for lines in panels.values() for label in lines}))
    handles, order = {}, list(dict.fromkeys(label for lines in panels.values() for label in lines))
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for label, (x, y, *error) in lines.items():
            number = order.index(label)  # the same colour in every panel
            style = {"color": f"C{number % 10}", "linestyle": STYLES[number // 10 % len(STYLES)], "linewidth": 1.3}
            marker = "o" if len(x) < 15 else None
            bars = error[0] if error and np.isfinite(error[0]).all() else None
            if bars is not None and len(x) > 1:  # side by side
                x = np.asarray(x) + 0.06 * np.diff(x).min() * (number - (len(order) - 1) / 2)
            style |= {"marker": marker, "markersize": 3, "capsize": 2, "elinewidth": 0.8}
            handles[label] = axes.errorbar(x, y, bars, **style)
        values = np.concatenate([np.asarray(line[1], dtype=float) for line in lines.values()])
        if values.min() > 0 and values.max() > 30 * values.min():
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(xlabel, fontsize=9)
        if xticks is not None:
            axes.set_xticks(list(xticks))
    _finish(figure, handles, path)


def bars(panels: Mapping[str, Mapping[str, tuple]], path: str | Path):
    """Horizontal bars: {title: {label: (value, half width of its error bar, none if not finite)}}."""
    most = max(map(len, panels.values()))
    figure, grid = grid_of(len(panels), 4.2, 0.9 + 0.28 * most, 0)
    for axes, (title, own) in zip(grid, panels.items(), strict=False):
        labels, place = list(own), np.arange(len(own))
        values, errors = (np.array([pair[i] for pair in own.values()], dtype=float) for i in (0, 1))
        axes.barh(place, values, 0.7, xerr=_finite(errors), color="#9db8d2", error_kw={"elinewidth": 0.9})
        axes.set_yticks(place, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        low, high = (values - _finite(errors)).min(), (values + _finite(errors)).max()
        if low > 0 and high < 2 * low:  # alike: from 0 on nothing could be told apart
            axes.set_xlim(low - 0.5 * (high - low or 0.1 * low), high + 0.2 * (high - low or 0.1 * low))
        axes.set_title(title, fontsize=10)
    _finish(figure, {}, path)


def _finite(errors: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(errors), errors, 0.0)


def reliability(bins: Mapping[str, tuple], path: str | Path):
    """{label: (confidence [bins], accuracy [bins], share of samples [bins])}, a panel each; empty bins are NaN."""
    figure, grid = grid_of(len(bins), 2.9, 3.0, 0)
    for axes, (label, (confidence, accuracy, share)) in zip(grid, bins.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        width = 1 / len(confidence)
        middles = (np.arange(len(confidence)) + 0.5) * width
        axes.bar(middles, np.asarray(share) / np.nanmax(share), width, color="#e3e8ee", label="share (largest = 1)")
        axes.plot(confidence, accuracy, "o-", markersize=3.5, linewidth=1.2, label="accuracy")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("confidence", fontsize=9)
    _finish(figure, dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True)), path)


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
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def _finish(figure, handles: Mapping, path: str | Path) -> None:
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)),
                      fontsize=9)  # fmt: skip
    save(figure, path)


def save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110)
