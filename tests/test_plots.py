import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from forde_fast import drawing, plots
from forde_fast.ensemble import Ensemble
from forde_fast.models import mlp
from forde_fast.trainer import RATIO_EVERY, Trainer

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "a name that is far too long to be drawn in full"]


def example(n, members=None, channels=None):
    generator = torch.Generator().manual_seed(0)
    shape = (n, 9, 7) if channels is None else (n, 9, 7, channels)
    images = torch.randint(256, shape, generator=generator).byte()
    labels = torch.randint(4, (n,), generator=generator)
    probs = torch.randn(*((n, 4) if members is None else (members, n, 4)), generator=generator).softmax(-1)
    return images, labels, probs


def texts(figure):
    """Every text of a figure of predictions with its box in pixels (x0, y0, x1, y1)."""
    found = [t for t in figure.findobj(Text) if t.get_text() and (t.axes is None or t in t.axes.texts)]
    return [(t.get_text(), t.get_window_extent().extents) for t in found]


@pytest.mark.parametrize(("n", "members", "channels"), [(1, None, None), (5, 3, 3), (12, 1, 1)])
def test_predictions(tmp_path, n, members, channels):
    path = tmp_path / "predictions.png"
    images, labels, probs = example(n, members, channels)
    figure = plots.predictions(images, labels, probs, CLASSES, path, title="five members")
    assert len([axes for axes in figure.axes if axes.images]) == n
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 297 * min(n, 4)
        assert picture.height == pytest.approx(440 * -(-n // 4) + 56 + 22 * ((members or 1) > 1), abs=2)
        assert picture.convert("L").getextrema() == (0, 255)


def test_panels_say_what_the_ensemble_says(tmp_path):
    images, _, _ = example(2)
    members = torch.tensor([[[0.8, 0.2, 0, 0], [0, 0, 1, 0]], [[0.4, 0.6, 0, 0], [0, 0, 1, 0]]])
    figure = plots.predictions(images, torch.tensor([0, 1]), members, CLASSES, tmp_path / "a.png")
    said = [text for text, _ in texts(figure)]
    assert {"true: T-shirt/top", "✓ T-shirt/top, 60%", "true: Trouser", "✗ Pullover, 100%"} <= set(said)
    # entropies of (0.6, 0.4): 0.673; of the members: (0.500 + 0.673) / 2
    assert "uncertainty 0.67 nats, epistemic 0.09" in said
    assert "uncertainty 0.00 nats, epistemic 0.00" in said
    alone = plots.predictions(images, torch.tensor([0, 1]), members[0], CLASSES, tmp_path / "b.png")
    assert "uncertainty 0.50 nats" in [text for text, _ in texts(alone)]


def test_nothing_is_cut_off_or_overlaps(tmp_path):
    images, labels, probs = example(5, 3)
    predictions = plots.predictions(images, labels, probs, CLASSES, tmp_path / "a.png", title="five images")
    training = plots.training({"de": records(20), "forde": records(20)}, tmp_path / "b.png")
    names = {f"a run with a long name, number {i}": records(20, ["cross_entropy"]) for i in range(13)}
    narrow = plots.training(names, tmp_path / "c.png")
    narrow.draw_without_rendering()  # what is measured below has another resolution than the file
    panels = {figure: [*figure.axes, *figure.legends] for figure in (training, narrow)}
    placed = {figure: [(one, one.get_tightbbox().extents) for one in own] for figure, own in panels.items()}
    for figure, boxes in {predictions: texts(predictions), **placed}.items():
        for i, (name, box) in enumerate(boxes):
            assert (box[:2] >= -1).all(), name
            assert (box[2:] <= figure.bbox.size + 1).all(), name
            for other, beside in boxes[:i]:
                apart = (box[:2] >= beside[2:] - 1).any() or (beside[:2] >= box[2:] - 1).any()
                assert apart, (name, other)


@pytest.fixture
def cats(tmp_path, monkeypatch):
    """An installed font that has 猫 and nothing else."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((500, 700))
    pen.lineTo((900, 0))
    pen.closePath()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Cats", "styleName": "Regular"})
    font.setupOS2(usWeightClass=400)
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    return "Cats"


NAMES = ["猫", "\u4e9c is in no font here", "$x", "a\nb"]


def test_names_are_drawn_in_any_script(tmp_path, cats):
    images, _, probs = example(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's of a missing glyph
        figure = plots.predictions(images, torch.arange(4), probs, NAMES, tmp_path / "a.png")
        log = {name: records(9, ["cross_entropy"]) for name in NAMES}
        legend = plots.training(log, tmp_path / "b.png").legends[0]
    said = {text.get_text(): text for text in figure.findobj(Text)}
    assert {"true: 猫", "true: class 1", "true: \\$x", "true: class 3"} <= set(said)
    assert said["true: 猫"].get_fontfamily()[-1] == cats
    assert [text.get_text() for text in legend.get_texts()] == ["猫", "\\u4e9c is in no font here", "\\$x", "a\\nb"]


def test_names_without_an_installed_font_are_numbers(tmp_path):
    images, _, probs = example(4)
    names = ["\U0010fffd", "Trouser", "\ue000", "x"]  # of private use
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.predictions(images, torch.arange(4), probs, names, tmp_path / "a.png")
    assert {"true: class 0", "true: Trouser"} <= {text for text, _ in texts(figure)}


def test_wide_letters_are_cut_to_the_same_width():
    assert plots._cut("a" * 28) == "a" * 28
    assert plots._cut("a" * 29) == "a" * 27 + "…"
    assert plots._cut("猫" * 14) == "猫" * 14
    assert plots._cut("猫" * 15) == "猫" * 13 + "…"


def test_arrays_and_few_classes(tmp_path):
    images, _, _ = example(2)
    plots.predictions(images.numpy(), np.array([0, 1]), np.eye(2), ["a", "b"], tmp_path / "a.png")
    plots.predictions(images, torch.tensor([0, 0]), torch.ones(2, 1), ["only"], str(tmp_path / "b.png"))
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": [[0]]}, TypeError, "images: expected a tensor or array, got list"),
        ({"images": torch.zeros(3, 9, 7)}, TypeError, "images: expected uint8, got torch.float32"),
        ({"images": torch.zeros(3, 9, 7, 2).byte()}, ValueError, "images: expected .* got shape"),
        ({"images": torch.zeros(0, 9, 7).byte()}, ValueError, "images: expected at least one"),
        ({"images": torch.zeros(65, 9, 7).byte()}, ValueError, "images: expected at most 64, got 65"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "labels: expected B = 3"),
        ({"labels": torch.tensor([0, 1, 4])}, ValueError, "labels: expected values from 0 to 3"),
        ({"probabilities": torch.eye(4)}, ValueError, r"probabilities: expected \[n, K\] = \[3, 4\]"),
        ({"probabilities": torch.ones(3, 4)}, ValueError, "probabilities: expected rows summing to 1"),
        ({"probabilities": [0.5]}, TypeError, "probabilities: expected a tensor or array"),
        ({"classes": ["a"]}, ValueError, r"probabilities: expected \[n, K\] = \[3, 1\]"),
    ],
)
def test_bad_predictions(tmp_path, change, error, message):
    images, labels, probs = example(3)
    good = {"images": images, "labels": labels, "probabilities": probs, "classes": CLASSES}
    with pytest.raises(error, match=f"^{message}"):
        plots.predictions(**{**good, **change}, path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def records(n, keys=tuple(plots.CURVES)):
    return [{"step": 10 * i, **{key: 1 + 0.1 * i for key in keys}} for i in range(n)]


def test_training_draws_what_the_log_has(tmp_path):
    log = records(30, ["cross_entropy", "gradient_cosine"])
    log.insert(3, {"step": 21, "epoch": 1, "accuracy": 0.9})  # a record of another kind
    log[5]["gradient_cosine"] = None
    figure = plots.training(log, tmp_path / "a.png")
    assert [axes.get_title() for axes in figure.axes] == [
        plots.CURVES["cross_entropy"],
        plots.CURVES["gradient_cosine"],
    ]
    cross_entropy, cosine = (axes.lines[0].get_xydata() for axes in figure.axes)
    assert cross_entropy.tolist() == [[10 * i, 1 + 0.1 * i] for i in range(30)]
    assert len(cosine) == 29
    assert not figure.legends
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600
        assert picture.height > 250


def test_training_draws_methods_over_each_other(tmp_path):
    runs = {"de": records(9, ["cross_entropy"]), "forde": records(1)}
    figure = plots.training(runs, tmp_path / "a.png")
    assert len(figure.axes) == len(plots.CURVES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["de", "forde"]
    for axes in figure.axes:  # a method has its colour in every panel
        de, forde = axes.lines
        assert de.get_color() != forde.get_color()
        assert forde.get_color() == figure.axes[0].lines[1].get_color()


def drawn_ticks(axis):
    low, high = sorted(axis.get_view_interval())
    return [label.get_text() for tick, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            if low <= tick <= high]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 4, 7, 105, 2000])
def test_steps_have_whole_ticks(tmp_path, steps):
    log = [{"step": i + 1, "cross_entropy": 2.0 - i / steps} for i in range(steps)]
    figure = plots.training(log, tmp_path / "a.png")
    ticks = drawn_ticks(figure.axes[0].xaxis)
    assert 1 <= len(ticks) <= 8
    assert all(tick.isdigit() for tick in ticks)


def test_what_hardly_moves_is_drawn_flat_and_without_an_offset(tmp_path):
    log = [{"step": i, "weight_entropy": 5.35243268 + 1e-9 * (-1) ** i, "repulsion": 5 + 0.01 * i} for i in range(9)]
    figure = plots.training(log, tmp_path / "a.png")
    for axes in figure.axes:
        assert axes.yaxis.get_offset_text().get_text() == ""
        assert all(len(tick) <= 5 for tick in drawn_ticks(axes.yaxis))
    repulsion, entropy = (axes.get_ylim() for axes in figure.axes)
    assert np.ptp(entropy) > 0.1
    assert np.ptp(repulsion) < 0.1


@pytest.mark.parametrize("every", [1, 3])
def test_only_what_was_measured_is_a_point(tmp_path, every):
    """The trainer's log has the last measurement's numbers in between."""
    x, y = torch.randn(16, 1, 2, 3), torch.randint(3, (16,))
    trainer = Trainer(Ensemble(lambda: mlp(3, (1, 2, 3), hidden=(4,)), members=2), repulsion_every=every)
    log = []
    for _ in range(2 * every * RATIO_EVERY + 2):
        seen = trainer.step(x, y)
        log.append({"step": trainer.steps, **{name: float(value) for name, value in seen._asdict().items()}})
    count = {"cross_entropy": 1, "bandwidth_median": every, "gradient_ratio": every * RATIO_EVERY}
    figure = plots.training(log, tmp_path / "a.png")
    drawn = {axes.get_title(): axes.lines[0].get_xdata().tolist() for axes in figure.axes}
    for key, gap in count.items():
        assert drawn[plots.CURVES[key]] == list(range(1, len(log) + 1, gap))


def test_lines_are_told_apart():
    styles = [drawing.line_style(number, 30) for number in range(30)]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 30
    assert styles[0]["linewidth"] > styles[1]["linewidth"] > styles[29]["linewidth"] > 1


def test_a_cosine_that_begins_near_zero_is_not_drawn_over_decades():
    axes = Figure().add_subplot()
    drawing.set_scale(axes, np.r_[0.002, np.linspace(0.1, 0.3, 50)])
    assert axes.get_yscale() == "linear"


def test_decades_get_a_logarithmic_axis(tmp_path):
    log = [{"step": i, "cross_entropy": 10.0**-i, "repulsion": 10.0**-i - 0.01} for i in range(4)]
    log.append({"step": 4, "cross_entropy": float("nan"), "repulsion": 0.5})
    figure = plots.training(log, tmp_path / "a.png")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ([], ValueError),
        ({}, ValueError),
        ([{"step": 1, "accuracy": 0.5}], ValueError),
        ([{"cross_entropy": 1}], ValueError),
        ("log.jsonl", TypeError),
        ({"de": 3}, TypeError),
    ],
)
def test_bad_log(tmp_path, log, error):
    with pytest.raises(error, match=r"^log: expected "):
        plots.training(log, tmp_path / "a.png")
