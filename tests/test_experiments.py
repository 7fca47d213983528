"""The experiments and the report: what they compute, and that each leaves its page and figures."""

import re
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from forde_fast import cli
from forde_fast.ensemble import Ensemble
from forde_fast.evaluation import score
from forde_fast.experiments import figures, pictures, registry, report, sweeps
from forde_fast.experiments.lab import SETTINGS, Lab, Setting
from forde_fast.experiments.registry import EXPERIMENTS
from forde_fast.experiments.report import as_html, reliability_bins

TINY = Setting("digits", "mlp", width=8, members=2, seeds=2, epochs=1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pictures, "TOY_MEMBERS", 2)
    monkeypatch.setattr(pictures, "TOY_STEPS", 2)
    monkeypatch.setattr(pictures, "DRAWN", 1)
    monkeypatch.setattr(sweeps, "ALPHAS", (0.0, 1.0))
    monkeypatch.setattr(sweeps, "STRENGTHS", (1.0,))
    monkeypatch.setattr(sweeps, "SIZES", (2, 3))
    monkeypatch.setattr(Lab.corrupted, "__defaults__", (("contrast", "gaussian_noise"), None))
    monkeypatch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def is_picture(path):
    return path.read_bytes()[:4] == b"\x89PNG"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")  # the corrupted images are made once


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_leaves_its_page(name, folder):
    setting = TINY if name == "corruptions" else replace(TINY, seeds=1)
    said = []
    text = registry.run(name, Lab(setting, folder / name, say=said.append))
    assert text == (folder / name / f"{name}.md").read_text()
    assert "nan" not in text
    assert ("members 2" in text) == (name not in registry.TOYS)
    assert said
    drawn = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert drawn
    assert all(is_picture(folder / name / picture) for picture in drawn)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SETTINGS, "small", TINY)
    assert cli.main(["experiment", "bandwidth", "--seeds", "1", "--out", str(tmp_path / "b"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("# bandwidth")

    def fails(name, lab):
        raise ValueError("step 3: expected a finite bandwidth")

    monkeypatch.setattr(registry, "run", fails)
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiment", "bandwidth", "--out", str(tmp_path / "c")])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "forde-fast experiment: error: step 3: expected a finite bandwidth\n"
    for arguments, message in ((["sweep"], "name: expected one of lengthscale"),
                               (["size", "--setting", "large"], "setting: expected one of small")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(["experiment", *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_methods_of_a_lab_start_from_the_same_members(tmp_path):
    own, rows = Lab(TINY, tmp_path), []
    for method in ("de", "forde-pca", "weight-rde"):
        trained = own.train(method, seed=3, weight=0.0)
        rows.append(trained.ensemble.flat)
        assert len(trained.log["cross_entropy"]) == len(own.x) // 128
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_memory_of_a_step_is_largest_where_input_gradients_are(tmp_path):
    own = Lab(replace(TINY, width=32), tmp_path)
    found = sweeps.steps(own, rounds=1)
    assert found["de"][1] == 1
    assert found["forde-pca"][2] > 1.2 * found["de"][2] > 0


# ---------------------------------------------------------------- class-activation maps


class Flat(nn.Module):
    """One convolution without padding, whose map is known."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 1, bias=False), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_maps_are_the_weighted_activations():
    """With a mean over the image before the head, d logit / d A_k is head[y, k] / (H W) everywhere."""
    ensemble, x, y = Ensemble(Flat, 2), torch.randn(5, 1, 3, 2), torch.randint(4, (5,))
    found = pictures.maps_of(ensemble, "conv", x, y)
    for i, member in enumerate(ensemble.members):
        weights = member.head.weight[y] / 6  # [5, 3]
        wanted = (weights[:, :, None, None] * member.conv(x)).sum(1).relu()
        assert torch.allclose(found[i], wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError):
        pictures.maps_of(ensemble, "conv", x.expand(-1, 2, -1, -1), y)
    assert not any(member.conv._forward_hooks for member in ensemble.members)


def test_distance_of_maps_by_loops():
    maps = torch.rand(3, 4, 2, 5, dtype=torch.float64)
    pairs = [F.cosine_similarity(maps[i].flatten(1), maps[j].flatten(1)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pictures.distance(maps) == pytest.approx(1 - float(torch.stack(pairs).mean()))
    assert pictures.distance(maps[:1].expand(3, -1, -1, -1)) == pytest.approx(0, abs=1e-12)


def test_depths():
    layers = OrderedDict(conv=nn.Conv2d(1, 2, 1), relu0=nn.ReLU(), conv1=nn.Conv2d(2, 2, 1), relu1=nn.ReLU())
    assert pictures.depths_of(nn.Sequential(layers)) == ["relu0", "relu1"]
    from forde_fast.models import resnet18

    assert pictures.depths_of(resnet18(width=2)) == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]


# ---------------------------------------------------------------- report


def test_reliability_bins_give_the_calibration_error():
    probs = torch.softmax(2 * torch.randn(400, 5, dtype=torch.float64), 1)
    labels = torch.randint(5, (400,))
    confidence, predicted = probs.max(1)
    means, accuracy, share = reliability_bins(confidence.numpy(), (predicted == labels).numpy())
    assert share.sum() == pytest.approx(1)
    ece = np.nansum(share * np.abs(accuracy - means))
    assert ece == pytest.approx(score(probs, labels)["ece"], abs=1e-12)


def test_report_of_runs(tmp_path, capsys):
    common = ["--data", "digits", "--width", "8", "--members", "2", "--epochs", "1", "--train-size", "256",
              "--test-size", "60"]  # fmt: skip
    cli.main(["compare", *common, "--methods", "forde-pca,de", "--out", str(tmp_path / "both")])
    capsys.readouterr()
    out = tmp_path / "report"
    assert cli.main(["report", str(tmp_path / "both"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    page, text = (out / "index.html").read_text(), (out / "report.md").read_text()
    assert text.index("| de |") < text.index("| forde-pca |")
    assert "one seed says nothing" in text
    assert "All runs: data digits, train size 256, test size 60, model mlp, width 8, members 2, epochs 1," in text
    assert "-0.00 |" not in text
    for name in ("severity.png", "reliability.png", "training.png", "cost.png"):
        assert is_picture(out / name)
        assert f"]({name})" in text
    assert page.count("data:image/png;base64,") == 4
    assert "src=" not in page.replace('src="data:', "")  # one file, nothing fetched
    assert page.count("<table>") == page.count("</table>") >= 4
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(tmp_path / "nothing")])
    assert stop.value.code == 2
    assert "run: expected a folder with finished runs" in capsys.readouterr().err


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    return kept


def test_values_are_points_with_their_intervals_named(tmp_path, drawn):
    rows = {"de": (0.98, 0.05), "猫 $x, and of many letters": (1.0, 0.0)}
    figures.points(
        {
            "a": rows,
            "of two members [% of all test images]": {name: (mean, np.inf) for name, (mean, _) in rows.items()},
        },
        tmp_path / "a.png",
    )
    figures.points({"one seed": {"de": (0.98, np.nan)}}, tmp_path / "b.png")
    several, one = drawn
    for axes in (*several.axes, *one.axes):
        assert not axes.patches  # a bar that begins elsewhere than at 0 says nothing
        low, high = axes.title.get_window_extent().extents[[0, 2]]
        assert 0 <= low < high <= axes.figure.bbox.width
    assert several.axes[0].lines[0].get_xdata().tolist() == [0.98, 1.0]
    assert [text.get_text() for text in several.legends[0].get_texts()] == [figures.INTERVALS]
    assert not one.legends


def test_curves_have_whole_ticks_one_range_and_their_intervals_named(tmp_path, drawn):
    steps, values = np.arange(1, 8), np.linspace(1, 2, 7)
    panels = {"all": {"de": (steps, values)}, "few": {"de": (steps[:1], values[:1])}}
    figures.curves(panels, tmp_path / "a.png", "step")
    figures.curves({"a": {"de": (steps, values, np.full(7, 0.1))}}, tmp_path / "b.png", "step")
    figures.curves({"a": {"de": ([0.0, 0.4], [1, 2])}}, tmp_path / "c.png", "alpha")
    plain, intervals, shares = drawn
    assert all((axes.get_xticks() == np.round(axes.get_xticks())).all() for axes in plain.axes)
    assert plain.axes[0].get_xlim() == plain.axes[1].get_xlim()
    assert plain.legends[0].get_title().get_text() == ""
    assert " ".join(intervals.legends[0].get_title().get_text().split()) == figures.INTERVALS
    assert np.diff(shares.axes[0].get_xticks()).max() < 0.4


def test_gains_by_severity_are_paired_by_seed(tmp_path, monkeypatch):
    def found(row, seed, accuracy):
        scores = {str(severity): {"accuracy": accuracy - severity / 100} for severity in range(1, 6)}
        metrics = {"clean": {"accuracy": accuracy}, "corrupted": {"by_corruption": {"fog": scores}}}
        return report.Found(row, tmp_path, {"method": row, "seed": seed}, metrics)

    drawn = []
    monkeypatch.setattr(figures, "curves", lambda panels, *others: drawn.append(panels))
    runs = [found("de", 0, 0.6), found("de", 1, 0.9), found("forde-pca", 1, 0.91), found("forde-pca", 0, 0.62)]
    assert report._severity(runs, tmp_path / "a.png") == ""
    accuracy, gain = drawn[0].values()
    assert accuracy["de"][1] == pytest.approx([75, 74, 73, 72, 71, 70])
    severities, means, halves = gain["forde-pca"]
    assert list(severities) == list(range(6))
    assert means == pytest.approx([1.5] * 6)
    assert halves == pytest.approx([0.5 * 12.706] * 6, rel=1e-4)  # seeds differ by 30 points, gains by 1
    report._severity(runs[:3], tmp_path / "a.png")
    assert not np.isfinite(list(drawn[1].values())[1]["forde-pca"][2]).any()


def test_pages_escape_what_they_show(tmp_path):
    page = as_html("# a < b\n\n| x & y | z |\n|---|---|\n| **1** | <script> |\n", tmp_path)
    assert "<h1>a &lt; b</h1>" in page
    assert "<th>x &amp; y</th>" in page
    assert "<td><b>1</b></td><td>&lt;script&gt;</td>" in page
