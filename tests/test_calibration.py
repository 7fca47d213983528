"""Temperature scaling."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from forde_fast.evaluation import calibrated_nll, fit_temperature, score, temper


def sample(size=4000, classes=5, sharpness=1.0, seed=0):
    """Probabilities and labels drawn from them; the probabilities are then made too sharp."""
    draw = np.random.default_rng(seed)
    true = torch.from_numpy(draw.normal(size=(size, classes)) * 2).softmax(1)
    labels = torch.multinomial(true, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return temper(true, 1 / sharpness), labels


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_finds_the_least_nll(sharpness):
    probs, labels = sample(sharpness=sharpness)
    found = fit_temperature(probs, labels)
    assert found == pytest.approx(sharpness, rel=0.1)

    def nll(log_t):
        return log_loss(labels, temper(probs, np.exp(log_t)), labels=range(5))

    best = minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-9})
    assert nll(np.log(found)) == pytest.approx(best.fun, abs=1e-6)
    assert fit_temperature(probs.numpy().astype(np.float32), labels) == pytest.approx(found, rel=1e-4)


def test_certain_predictions():
    sure = torch.eye(3).repeat(2, 1)
    assert fit_temperature(sure, torch.arange(3).repeat(2)) == pytest.approx(0.01)  # right: the sharper the better
    assert fit_temperature(sure, torch.tensor([1, 2, 0, 1, 2, 0])) == pytest.approx(100)
    assert torch.isfinite(temper(sure, 0.01)).all()


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf"), None])
def test_bad_temperature(temperature):
    with pytest.raises(ValueError, match=f"^temperature: expected a finite number > 0, got {temperature}"):
        temper(torch.eye(2), temperature)


def test_calibrated_nll_is_of_samples_that_were_not_fitted():
    probs, labels = sample(sharpness=3.0)
    got = calibrated_nll(probs, labels)
    true, _ = sample(sharpness=1.0)
    assert got["temperature"] == pytest.approx(3, rel=0.1)
    assert got["nll"] == pytest.approx(score(true, labels)["nll"], abs=0.01)
    assert got["nll"] < score(probs, labels)["nll"] - 0.1
    assert got == calibrated_nll(probs, labels)
    # one sample in each half says nothing of the other: the fitted one alone would cost nothing
    two = calibrated_nll(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]), splits=1)
    assert two["nll"] > 50
    with pytest.raises(ValueError, match="B: expected a whole number >= 2, got 1"):
        calibrated_nll(torch.eye(2)[:1], torch.tensor([0]))


def test_calibrated_nll_is_the_mean_of_both_directions():
    probs, labels = sample(size=41, sharpness=3.0)
    one, other = np.random.default_rng(3).permutation(41)[:21], np.random.default_rng(3).permutation(41)[21:]
    found = []
    for fitted, scored in ((one, other), (other, one)):
        temperature = fit_temperature(probs[fitted], labels[fitted])
        found.append((score(temper(probs[scored], temperature), labels[scored])["nll"], temperature))
    assert found[0] != pytest.approx(found[1], rel=0.05)
    got = calibrated_nll(probs, labels, splits=1, seed=3)
    assert (got["nll"], got["temperature"]) == pytest.approx(np.mean(found, axis=0))
