import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from forde_fast import plots

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
        assert picture.height == pytest.approx(440 * -(-n // 4) + 55, abs=2)
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
    panels = [*training.axes, *training.legends]
    panels = [(panel, panel.get_tightbbox().extents) for panel in panels]
    for figure, boxes in ((predictions, texts(predictions)), (training, panels)):
        for i, (name, box) in enumerate(boxes):
            assert (box[:2] >= -1).all(), name
            assert (box[2:] <= figure.bbox.size + 1).all(), name
            for other, beside in boxes[:i]:
                apart = (box[:2] >= beside[2:] - 1).any() or (beside[:2] >= box[2:] - 1).any()
                assert apart, (name, other)


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
