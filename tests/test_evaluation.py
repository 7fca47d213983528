import math
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from forde_fast import evaluation
from forde_fast.evaluation import evaluate_corruptions, score, score_members, uncertainty


def probabilities(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=dtype)).softmax(-1)


def labels_of(samples, classes, seed=1):
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("samples", "classes"), [(1, 2), (1, 7), (500, 2), (1000, 10), (333, 101)])
def test_against_torchmetrics_and_scikit_learn(samples, classes):
    probs, labels = probabilities(samples, classes), labels_of(samples, classes)
    got = score(probs, labels)
    accuracy = multiclass_accuracy(probs, labels, classes, average="micro")
    assert got["accuracy"] == pytest.approx(accuracy.item(), abs=1e-6)
    ece = multiclass_calibration_error(probs, labels, classes, n_bins=15, norm="l1")
    assert got["ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert got["nll"] == pytest.approx(log_loss(labels, probs, labels=range(classes)), abs=1e-6)
    one_hot = torch.nn.functional.one_hot(labels, classes)
    brier = sum(brier_score_loss(one_hot[:, k], probs[:, k], labels=[0, 1], pos_label=1) for k in range(classes))
    assert got["brier"] == pytest.approx(brier, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_bin_below(dtype):
    # 0.6 = 9/15 is the edge: with (lo, hi] it (right) joins 0.55 (wrong) in bin (8/15, 9/15]; with [lo, hi)
    # it would stand alone, and the error be (0.55 + 0.4) / 2.
    probs = torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=dtype)
    got = score(probs, torch.tensor([0, 1]))["ece"]
    assert got == pytest.approx(abs(0.4 - 0.55) / 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_are_exact_to_the_last_bit(dtype):
    edges = (np.arange(8, 16) / 15).astype(dtype)  # what two classes' confidence can reach
    lowest, highest = np.nextafter(edges[:-1], dtype(1)), edges[1:]
    below = np.nextafter(highest, dtype(0))
    confidence = np.stack([lowest, below, highest], 1)
    labels = np.repeat(np.arange(len(highest)) % 2, 3)  # all right, all wrong, …: a stray one would cancel
    got = score(np.stack([confidence, 1 - confidence], 2).reshape(-1, 2), labels)["ece"]
    expected = np.abs((labels == 0) - confidence.astype(np.float64).flatten()).mean()
    assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_certain_and_right(classes):
    got = score(torch.eye(classes), torch.arange(classes))
    assert got == {"accuracy": 1, "nll": 0, "ece": 0, "brier": 0}
    assert all(type(value) is float for value in got.values())


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float32, 87.3365), (torch.bfloat16, 87.3365), (torch.float64, 708.3964)]
)
def test_certain_and_wrong_is_finite(dtype, floor):
    got = score(torch.tensor([[1.0, 0.0]], dtype=dtype), torch.tensor([1]))
    assert got == {"accuracy": 0, "nll": pytest.approx(floor, abs=1e-3), "ece": 1, "brier": 2}


def test_ties_go_to_the_first_class():
    uniform = torch.full((2, 4), 0.25)
    assert score(uniform, torch.tensor([0, 1])) == pytest.approx(
        {"accuracy": 0.5, "nll": math.log(4), "ece": 0.25, "brier": 0.75}
    )


def test_input_kinds_agree():
    probs, labels = probabilities(40, 3), labels_of(40, 3)
    expected = score(probs, labels)
    assert score(probs.numpy(), labels.numpy().astype(np.uint8)) == expected
    assert score(probs.requires_grad_(), labels.int()) == expected
    turned = probs.detach().flip(0).contiguous().numpy()[::-1]  # a negative stride
    turned.flags.writeable = False
    assert score(turned, labels) == expected
    assert score(probs.detach().T.contiguous().T, labels) == expected
    assert score(probs.float(), labels) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_labels_may_be_of_any_integer_dtype(dtype):
    probs, labels = probabilities(40, 3), labels_of(40, 3)
    assert score(probs, labels.to(dtype)) == score(probs, labels)
    assert score(probs, labels.to(dtype).numpy()) == score(probs, labels)
    with pytest.raises(ValueError, match=r"^labels: expected values from 0 to 2, got values from 1 to 3"):
        score(probs, (labels + 1).to(dtype))


def test_labels_that_no_int64_holds_are_refused():
    for label in (2**63, 2**64 - 1):
        with pytest.raises(ValueError, match=r"^labels: expected values from 0 to 1, got"):
            score(torch.eye(2), np.array([0, label], np.uint64))


def test_arrays_of_other_bytes():
    probs, labels = probabilities(40, 3), labels_of(40, 3)
    assert score(probs.numpy().astype(">f8"), labels.numpy().astype(">i4")) == score(probs, labels)
    assert score(probs.float().numpy().astype(">f4"), labels) == score(probs.float(), labels)


@pytest.mark.parametrize("dtype", ["O", "S3"])
def test_arrays_that_torch_does_not_have(dtype):
    probs, labels = probabilities(4, 3).numpy(), labels_of(4, 3).numpy()
    with pytest.raises(TypeError, match=r"^probs: expected a dtype that torch has, got "):
        score(probs.astype(dtype), labels)
    with pytest.raises(TypeError, match=r"^labels: expected a dtype that torch has, got "):
        score(probs, labels.astype(dtype))


def test_scores_under_a_default_device():
    members, labels = probabilities(3, 20, 2), labels_of(20, 2)
    images = torch.zeros(20, 4, 4, dtype=torch.uint8)

    def scores():
        return [
            score(members[0], labels),
            score_members(members, labels),
            evaluation.Scorer().add(members, labels).result(),
            evaluate_corruptions(lambda images: members, images, labels, ["contrast"], (1,)),
        ]

    expected = scores()
    with torch.device("meta"):
        assert scores() == expected


def test_members():
    members, labels = probabilities(3, 50, 4, dtype=torch.float32), labels_of(50, 4)
    got = score_members(members, labels)
    assert got["members"] == [score(member, labels) for member in members]
    assert got["ensemble"] == score(members.double().mean(0), labels)
    assert score_members(members[:1], labels)["ensemble"] == score(members[0], labels)
    # a label that no member thinks possible costs the ensemble what it costs a member
    impossible = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    got = score_members(impossible, torch.tensor([1]))
    assert got["ensemble"] == got["members"][0]


def test_uncertainty():
    members = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.9, 0.1]], [[0.0, 1.0], [0.5, 0.5], [0.9, 0.1]]])
    got = uncertainty(members)
    log2, entropy = math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert got["total"].tolist() == pytest.approx([log2, log2, entropy], abs=1e-7)
    assert got["aleatoric"].tolist() == pytest.approx([0, log2, entropy], abs=1e-7)
    assert got["epistemic"].tolist() == pytest.approx([log2, 0, 0], abs=1e-7)


def test_epistemic_uncertainty_is_the_mean_divergence_from_the_mean():
    members = probabilities(5, 200, 7)
    got = uncertainty(members)
    divergence = (members * (members / members.mean(0)).log()).sum(2).mean(0)
    torch.testing.assert_close(got["epistemic"], divergence, rtol=1e-9, atol=1e-12)
    assert (got["epistemic"] >= 0).all()
    assert (got["epistemic"] <= math.log(5)).all()
    assert not uncertainty(members[:1].expand(3, -1, -1))["epistemic"].gt(1e-15).any()


@pytest.mark.parametrize(
    ("probs", "error", "message"),
    [
        ([[1.0]], TypeError, "a tensor or array, got list"),
        (torch.eye(2).int(), TypeError, "a floating dtype, got torch.int32"),
        (torch.ones(2), ValueError, "2 dimensions [B, K], got shape [2]"),
        (torch.ones(0, 2), ValueError, "at least one of each of B, K, got shape [0, 2]"),
        (torch.tensor([[math.nan, 1]]), ValueError, "finite"),
        (torch.tensor([[math.inf, 1]]), ValueError, "finite"),
        (torch.tensor([[1.2, -0.2]]), ValueError, "values in [0, 1], got -0.2 to 1.2"),
        (torch.tensor([[0.5, 0.502]]), ValueError, "rows summing to 1 within 0.001, got a sum of 1.002"),
        (torch.tensor([[0.5, 0.498]]), ValueError, "rows summing to 1 within 0.001, got a sum of 0.998"),
    ],
)
def test_bad_probs(probs, error, message):
    with pytest.raises(error, match="^probs: expected " + re.escape(message)):
        score(probs, torch.tensor([0]))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ([0, 1], TypeError, "a tensor or array, got list"),
        (torch.tensor([0.0, 1.0]), TypeError, "an integer"),
        (torch.tensor([True, False]), TypeError, "an integer"),
        (torch.tensor([[0, 1]]), ValueError, "1 dim"),
        (torch.tensor([0]), ValueError, "B = 2 as the probabilities, got B = 1"),
        (torch.tensor([0, 2]), ValueError, "values from 0 to 1, got values from 0 to 2"),
        (torch.tensor([-1, 0]), ValueError, "values from 0 to 1, got values from -1 to 0"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match="^labels: expected " + re.escape(message)):
        score(torch.eye(2), labels)


def test_bad_members():
    with pytest.raises(ValueError, match=r"^member_probs: expected 3 dimensions \[M, B, K\], got"):
        score_members(torch.eye(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^member_probs: expected at least one of each"):
        uncertainty(torch.ones(0, 2, 2))
    with pytest.raises(ValueError, match=r"^labels: expected B = 2"):
        score_members(torch.eye(2).expand(3, 2, 2), torch.tensor([0]))


def brightness_model(calls=None):
    """Two members that tell bright images (class 1) from dark ones, one of them surer than the other."""

    def member_probs_of(images):
        if calls is not None:
            calls.append(images.shape)
        assert images.dtype == torch.uint8
        bright = images.double().flatten(1).mean(1) / 255
        probs = torch.stack([bright.clamp(0, 1), (4 * bright - 2).sigmoid()])
        return torch.stack([1 - probs, probs], 2)

    return member_probs_of


def test_corruptions_are_averaged():
    images = torch.randint(256, (6, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels, calls = torch.tensor([0, 1, 0, 1, 1, 0]), []
    got = evaluate_corruptions(
        brightness_model(calls), images, labels, ["brightness", "gaussian_noise"], severities=(1, 4), seed=3
    )
    assert calls == [images.shape] * 4
    assert {name: list(by) for name, by in got["by_corruption"].items()} == {
        "brightness": [1, 4],
        "gaussian_noise": [1, 4],
    }
    for metric in evaluation.METRICS:
        values = [s[metric] for by in got["by_corruption"].values() for s in by.values()]
        assert got[metric] == pytest.approx(sum(values) / 4)

    from forde_fast.data.corruptions import corrupt

    corrupted = corrupt(images, "gaussian_noise", 4, seed=3)
    expected = score(brightness_model()(corrupted).mean(0), labels)
    assert expected.items() <= got["by_corruption"]["gaussian_noise"][4].items()
    assert got["epistemic"] > 0


def test_parts_score_as_the_whole():
    """However the samples are cut into parts, and whichever corruption's parts come between."""
    members, labels = probabilities(3, 200, 5), labels_of(200, 5)
    whole = evaluation.Scorer().add(members, labels).result()
    assert score(members.mean(0), labels).items() <= whole.items()
    assert whole["disagreement"] == evaluation.disagreement(members)
    assert whole["epistemic"] == pytest.approx(uncertainty(members)["epistemic"].mean().item())
    parts = np.split(np.arange(200), [1, 50, 120])
    made = [("fog", s, members[:, part], labels[part]) for part in parts for s in (1, 2)]
    by = evaluation.score_corrupted(lambda probs: probs, made)["by_corruption"]["fog"]
    assert by[1] == by[2] == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="scores: expected at least one sample, got none"):
        evaluation.Scorer().result()


def test_averages_are_over_the_standard_the_extra_and_all():
    numbers = {name: {s: {"nll": 10.0 * i + s} for s in (1, 5)} for i, name in enumerate(("fog", "snow", "spatter"))}
    got = evaluation.averages(numbers)
    assert {group: found["nll"] for group, found in got.items()} == {"standard": 8, "extra": 23, "all": 13}
    assert evaluation.mean_scores(numbers, ["fog"], severities=(4, 5)) == {"nll": 5}
    assert evaluation.averages({"fog": numbers["fog"]}).keys() == {"standard", "all"}
    with pytest.raises(ValueError, match="names: expected corruptions that were scored at these severities"):
        evaluation.mean_scores(numbers, ["fog"], severities=(2,))
    scored = re.escape("names: expected corruptions that were scored (fog, snow, spatter), got 'frost'")
    with pytest.raises(ValueError, match=scored):
        evaluation.mean_scores(numbers, (name for name in ("fog", "frost")))


def test_preset_and_seed_reach_the_corruption(monkeypatch):
    seen = []

    def corrupt(images, name, severity, seed=0, preset="cifar"):
        seen.append((name, severity, seed, preset))
        return images

    monkeypatch.setattr("forde_fast.data.corruptions.corrupt", corrupt)
    images, labels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1])
    evaluate_corruptions(brightness_model(), images, labels, ["contrast"], preset="grey", seed=5)
    assert seen == [("contrast", severity, 5, "grey") for severity in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("names", "severities", "error", "message"),
    [
        (["rust"], (1,), ValueError, "names: expected one of .*contrast.* got 'rust'"),
        ("contrast", (1,), TypeError, "names: expected a list"),
        ([], (1,), ValueError, "names: expected at least one"),
        (["contrast", "contrast"], (1,), ValueError, "names: expected at least one, each once"),
        (["contrast"], (), ValueError, "severities: expected at least one"),
        (["contrast"], 3, TypeError, "severities: expected a list"),
        (["contrast"], (6,), ValueError, "severity: expected"),
    ],
)
def test_bad_corruptions(names, severities, error, message):
    images = torch.zeros(2, 4, 4, dtype=torch.uint8)
    with pytest.raises(error, match=f"^{message}"):
        evaluate_corruptions(brightness_model(), images, torch.tensor([0, 1]), names, severities)
