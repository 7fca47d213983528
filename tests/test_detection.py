"""Out-of-distribution detection and selective prediction."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from forde_fast.evaluation import auroc, detection, fpr95, selective_risk


@pytest.mark.parametrize(("known", "unknown", "levels"), [(1, 1, 9), (40, 3, 5), (101, 333, 10**6), (1000, 20, 30)])
def test_against_scikit_learn(known, unknown, levels):
    draw = np.random.default_rng(known)
    inside = draw.integers(levels, size=known) / levels  # few levels: many ties
    outside = draw.integers(levels, size=unknown) / levels + 0.2
    doubt, is_known = np.concatenate([inside, outside]), np.repeat([1, 0], [known, unknown])
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(1 - is_known, doubt), abs=1e-6)
    false, true, _ = roc_curve(is_known, -doubt, drop_intermediate=False)
    assert fpr95(inside, outside) == pytest.approx(false[true >= 0.95 - 1e-12].min(), abs=1e-6)


def test_perfect_chance_and_upside_down():
    low, high = torch.arange(40.0), torch.arange(40.0) + 100
    assert detection(low, high) == {"auroc": 1, "fpr95": 0}
    assert detection(high, low) == {"auroc": 0, "fpr95": 1}
    assert detection(torch.ones(5), torch.ones(7)) == {"auroc": 0.5, "fpr95": 1}


def risk_one_by_one(doubt, correct):
    """The expected error of the k least uncertain, over all orders of equal ones."""
    risks = []
    for k in range(1, len(doubt) + 1):
        last = np.sort(doubt)[k - 1]
        sure, tied = doubt < last, doubt == last
        errors = (~correct[sure]).sum() + (k - sure.sum()) * (~correct[tied]).mean()
        risks.append(errors / k)
    return np.array(risks)


@pytest.mark.parametrize("levels", [1, 4, 1000])
def test_selective_risk(levels):
    draw = np.random.default_rng(levels)
    doubt, correct = draw.integers(levels, size=60), draw.random(60) < 0.7
    got = selective_risk(doubt, correct)
    np.testing.assert_allclose(got["risk"], risk_one_by_one(doubt, correct), atol=1e-12)
    assert got["coverage"][[0, -1]].tolist() == pytest.approx([1 / 60, 1])
    assert got["risk"][-1] == pytest.approx(1 - correct.mean())
    assert got["aurc"] == pytest.approx(got["risk"].mean())
    with torch.device("meta"):  # a default device is nothing to what was given
        again = selective_risk(doubt, correct)
    assert all(np.array_equal(again[name], got[name]) for name in got)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: auroc([1.0], torch.ones(1)), TypeError, "known: expected a tensor or array, got list"),
        (lambda: auroc(torch.ones(1), torch.ones(0)), ValueError, "unknown: expected at least one of each of C"),
        (lambda: fpr95(torch.ones(1, 1), torch.ones(1)), ValueError, r"known: expected 1 dimensions \[B\]"),
        (lambda: fpr95(torch.tensor([torch.nan]), torch.ones(1)), ValueError, "known: expected finite"),
        (lambda: selective_risk(torch.ones(2), torch.ones(3)), ValueError, "correct: expected one per sample, 2"),
        (lambda: selective_risk(torch.ones(2), torch.full((2,), 0.5)), ValueError, "correct: expected 0 and 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
