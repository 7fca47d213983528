"""What all figures share: colours, axes, legends, and letters that the font lacks. No global state."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterable, Mapping
from os import PathLike

import numpy as np

# Okabe and Ito's, which are told apart by colour-blind readers too, without their yellow, which is pale on white
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#999999")
STYLES = ("-", "--", ":", "-.")  # after all colours the same ones come again, broken
DECADES = 30  # largest over the tenth percentile: from there on an axis is logarithmic
FLAT, ROOM = 1e-3, 0.02  # of its size: a quantity that moves by less is drawn flat, not its rounding as a curve
LETTER, LINE = 0.085, 0.2  # inches that a legend's letter is wide at most, on average, and its line high
NO_LETTERS = "Last Resort"  # a font of boxes for everything


def line_style(number: int, count: int) -> dict:
    """Of the line `number` of `count`; those that are drawn first are wider, so that one below another is seen."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
        "linewidth": 1.2 + 1.4 * (1 - (number + 1) / count),
    }


def whole_ticks(axis, numbers: Iterable) -> None:
    """No ticks between steps, severities or members: where all numbers are whole, so are the ticks."""
    from matplotlib.ticker import MaxNLocator

    numbers = np.asarray(list(numbers), dtype=float)
    if (numbers == np.round(numbers)).all():
        axis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))


def set_scale(axes, values: np.ndarray) -> None:
    """The vertical axis for these values: logarithmic over decades, else without offsets such as 1e-10+5.35."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > DECADES * np.quantile(values, 0.1):
        axes.set_yscale("log")
        return
    axes.yaxis.get_major_formatter().set_useOffset(False)
    most = np.abs(values).max(initial=0)
    if len(values) and np.ptp(values) < FLAT * most:
        axes.set_ylim(values.mean() - ROOM * most, values.mean() + ROOM * most)


def add_legend(figure, handles: Mapping, title: str | None = None) -> None:
    """{label: its handle} below all panels. There is room for four labels in a line; for fewer the figure grows."""
    width = 0.6 + LETTER * max(map(len, handles))  # of an entry
    columns = min(4, len(handles), max(1, int(figure.get_figwidth() / width)))
    most = int((figure.get_figwidth() - 0.8) / LETTER)
    labels = [textwrap.fill(literal(label), most) for label in handles]
    title = title and textwrap.fill(title, most)
    lines = -(-len(labels) // columns) * max(len(label.splitlines()) for label in labels)
    lines += len((title or "").splitlines()) - -(-len(labels) // 4)
    figure.set_figheight(figure.get_figheight() + LINE * lines)
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": 9, "title_fontsize": 9}
    figure.legend(list(handles.values()), labels, title=title, **place)


def fonts_for(letters: Iterable[str]) -> dict[str, str]:
    """{letter: the family of an installed font that has it}, matplotlib's own before the others."""
    from matplotlib import font_manager

    own = font_manager.FontProperties()
    plain = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
    usual = [font for font in plain if str(font.weight) in ("400", "normal", "regular")]
    candidates = [(own.get_name(), font_manager.findfont(own)), *((font.name, font.fname) for font in usual)]
    found, missing = {}, {letter for letter in letters if unicodedata.category(letter) != "Cc"}  # no new line
    for family, path in candidates:
        if missing and not family.startswith(NO_LETTERS):
            try:
                font = font_manager.get_font(path)
            except (OSError, RuntimeError):  # removed since, or of a kind that matplotlib does not draw
                continue
            found |= {letter: family for letter in missing if font.get_char_index(ord(letter))}
            missing -= found.keys()
    return found


def literal(name: str) -> str:
    """A name as text: no formula between dollars, and for letters that no font has, their escapes."""
    known = fonts_for(name)
    letters = (letter if letter in known else letter.encode("unicode_escape").decode() for letter in name)
    return "".join(letters).replace("$", r"\$")


def save(figure, path: str | PathLike) -> None:
    """As a PNG, with letters that matplotlib's own font lacks from others."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    others = dict.fromkeys(fonts_for("".join(text.get_text() for text in texts)).values())
    for text in texts if len(others) > 1 else ():
        text.set_fontfamily([*text.get_fontfamily(), *others])
    figure.savefig(path, format="png", dpi=110)
