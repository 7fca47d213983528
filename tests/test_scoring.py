"""What goes into metrics.json, of a run of known probabilities: every number by hand or from its definition."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import forde_fast as ff
from forde_fast import scoring
from forde_fast.data import corrupt
from forde_fast.evaluation import calibrated_nll, score, uncertainty
from forde_fast.scoring import score_run

F64 = torch.float64
LABELS = torch.tensor([1, 1, 0, 0, 0, 1])
TEST = ([0.9, 0.95, 0.7, 0.4, 0.2, 0.05], [0.95, 0.45, 0.9, 0.3, 0.1, 0.15])  # of class 1, by each member
MEANS = (0.925, 0.7, 0.8, 0.35, 0.15, 0.1)
HELD, HELD_LABELS = ([0.85, 0.85, 0.15, 0.15], [0.95, 0.95, 0.05, 0.05]), torch.tensor([1, 1, 0, 1])  # 3 of 4 right
UNKNOWN = {"doubtful": ([0.5, 0.5], [0.5, 0.5]), "disputed": ([0.999, 0.001, 0.999], [0.001, 0.999, 0.001])}
NAMES = ("contrast", "gaussian_noise", "gaussian_blur")  # two standard ones and another; two have harder severities
ONE = NAMES[:1]


def both(ones):
    """Probabilities [M, N, 2] from those of class 1."""
    ones = torch.as_tensor(ones, dtype=F64)
    return torch.stack([1 - ones, ones], -1)


class Quadratic(nn.Module):
    """The gradient of logit y is weight[y] * x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64))

    def forward(self, x):
        return x.flatten(1).square() / 2 @ self.weight.T


class Stub:
    """As much of a run as is scored."""

    device, corrupted_files, data = torch.device("cpu"), None, SimpleNamespace(table=False)
    watch = staticmethod(lambda items, total: items)
    normalisation = staticmethod(lambda images: images.float() / 255)
    test_labels = LABELS

    def __init__(self, held=True, unknown=UNKNOWN, color=()):
        draw = lambda count: torch.randint(256, (count, 8, 8, *color), dtype=torch.uint8)  # noqa: E731
        self.ensemble = ff.Ensemble(Quadratic, 2)
        self.test_images, self.valid_images = draw(6), draw(4 if held else 0)
        self.valid_labels = HELD_LABELS[: len(self.valid_images)]
        self.unknown = {name: draw(len(ones[0])) for name, ones in unknown.items()}
        self.known = [(self.test_images, TEST), (self.valid_images, HELD)]
        self.known += [(self.unknown[name], ones) for name, ones in unknown.items()]

    def predict(self, images):
        for own, ones in self.known:
            if images is own:
                return both(ones)
        pixels = images.double().flatten(1)[:, [0, 30]].T  # of copies: by a pixel for each member
        return both(0.1 + 0.8 * pixels / 255)


@pytest.fixture(params=[True, False], ids=["copies kept", "not kept"])
def kept(request, monkeypatch):
    monkeypatch.setattr(scoring, "KEPT_BYTES", scoring.KEPT_BYTES if request.param else 0)


def near(x):
    return pytest.approx(x, rel=1e-6)


def entropy(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def true(ones, labels):
    """The probabilities of the labels."""
    return [p if y else 1 - p for p, y in zip(ones, labels.tolist(), strict=True)]


def test_clean():
    clean = score_run(Stub(), ONE)["clean"]
    assert clean["accuracy"] == near(4 / 6)
    assert clean["nll"] == near(mean(-math.log(p) for p in true(MEANS, LABELS)))
    assert clean["brier"] == near(mean(2 * (1 - p) ** 2 for p in true(MEANS, LABELS)))
    assert [one["accuracy"] for one in clean["members"]] == [near(4 / 6), near(3 / 6)]
    assert [one["nll"] for one in clean["members"]] == [
        near(mean(-math.log(p) for p in true(ones, LABELS))) for ones in TEST
    ]
    total, aleatoric = mean(map(entropy, MEANS)), mean(entropy(p) for ones in TEST for p in ones)
    assert (clean["total"], clean["aleatoric"]) == (near(total), near(aleatoric))
    assert clean["epistemic"] == near(total - aleatoric)
    # the surest first, by the mean: of 0.925 right, 0.1 wrong, 0.15 right, 0.8 wrong, 0.7 and 0.35 right
    assert clean["aurc"] == near((0 + 1 / 2 + 1 / 3 + 2 / 4 + 2 / 5 + 2 / 6) / 6)


def test_the_temperature_is_that_of_the_validation_images():
    """All are 0.9 sure and 3/4 right: log 9 / T = log 3."""
    metrics = score_run(Stub(), ONE)
    assert metrics["validation"]["accuracy"] == 0.75
    assert metrics["validation"]["nll"] == near(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    assert [one["nll"] for one in metrics["validation"]["members"]] == [
        near(-(3 * math.log(p) + math.log(1 - p)) / 4) for p in (0.85, 0.95)
    ]
    assert metrics["clean"]["temperature"] == near(2)
    tempered = [math.sqrt(p) / (math.sqrt(p) + math.sqrt(1 - p)) for p in true(MEANS, LABELS)]
    assert metrics["clean"]["calibrated_nll"] == near(mean(-math.log(p) for p in tempered))


def test_without_validation_images_it_is_fitted_on_other_test_images():
    metrics = score_run(Stub(held=False), ONE)
    assert "validation" not in metrics
    own = calibrated_nll(both(MEANS), LABELS)
    assert (metrics["clean"]["calibrated_nll"], metrics["clean"]["temperature"]) == (
        near(own["nll"]),
        near(own["temperature"]),
    )


def test_diversity_is_that_of_the_first_test_images(monkeypatch):
    """Of all of them the disagreement."""
    monkeypatch.setattr(scoring, "GRADIENT_IMAGES", 4)
    run = Stub()
    found = score_run(run, ONE)["diversity"]
    assert found["disagreement"] == near(1 / 6)
    x = run.test_images[:4].flatten(1).double() / 255
    one, other = (member.weight.detach().double()[LABELS[:4]] * x for member in run.ensemble.members)
    cosine = (one * other).sum(1) / one.norm(dim=1) / other.norm(dim=1)
    assert found["gradient_cosine"] == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert found["kernel_similarity"] == pytest.approx((-(2 - 2 * cosine)).exp().mean().item(), rel=1e-5)


def test_unknown_images_are_the_more_uncertain_ones():
    """Where members agree on 0.5 and where each is sure of another class; no known image is as uncertain in total."""
    found = score_run(Stub(), ONE)["ood"]
    everything, nothing = {"auroc": 1.0, "fpr95": 0.0}, {"auroc": 0.0, "fpr95": 1.0}
    assert found["doubtful"] == {"total": everything, "epistemic": nothing}
    assert found["disputed"] == {"total": everything, "epistemic": everything}
    assert "ood" not in score_run(Stub(unknown={}), ONE)


def scores(run, names, preset):
    """[one for each severity] of each corruption."""
    found = {}
    for name in names:
        for severity in range(1, 6):
            probs = run.predict(corrupt(run.test_images, name, severity, preset=preset))
            own = score(probs.mean(0), LABELS) | {kind: x.mean().item() for kind, x in uncertainty(probs).items()}
            own["disagreement"] = (probs[0].argmax(1) != probs[1].argmax(1)).double().mean().item()
            found.setdefault(name, []).append(own)
    return found


def means_of(found, *names):
    every = [own for name in names for own in found[name]]
    return {key: near(mean(own[key] for own in every)) for key in every[0]}


def by_corruption(found):
    return {n: {s: {k: near(x) for k, x in own.items()} for s, own in enumerate(by, 1)} for n, by in found.items()}


def test_corrupted(kept):
    run = Stub()
    metrics, cifar, grey = score_run(run, NAMES), scores(run, NAMES, "cifar"), scores(run, NAMES[1:], "grey")
    assert metrics["corrupted"] == {**means_of(cifar, *NAMES[:2]), "by_corruption": by_corruption(cifar)}
    assert metrics["corrupted_all"] == means_of(cifar, *NAMES)
    assert metrics["corrupted_extra"] == means_of(cifar, NAMES[2])
    assert metrics["corrupted_grey"] == {**means_of(grey, *NAMES[1:]), "by_corruption": by_corruption(grey)}
    assert means_of(cifar, *NAMES[1:]) != means_of(grey, *NAMES[1:])


def test_groups_that_there_are_none_of():
    run = Stub(color=(3,))
    run.ensemble = ff.Ensemble(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), 2)
    assert {"corrupted", "corrupted_all", "corrupted_extra"} == {x for x in score_run(run, NAMES) if "corrupted" in x}
    run.data = SimpleNamespace(table=True)
    assert not [x for x in score_run(run, NAMES) if "corrupted" in x]


def test_corrupted_files_in_the_place_of_copies():
    class Files(list):
        images = 6

    run = Stub()
    made = scores(run, ONE, "cifar")
    copies = [corrupt(run.test_images, "contrast", severity) for severity in range(1, 6)]
    run.corrupted_files = Files(("contrast", severity, x, LABELS) for severity, x in enumerate(copies, 1))
    metrics = score_run(run, NAMES)
    wanted = {**means_of(made, "contrast"), "by_corruption": by_corruption(made), "images": 6}
    assert metrics["corrupted"] == wanted
    assert {x for x in metrics if "corrupted" in x} == {"corrupted", "corrupted_all"}
