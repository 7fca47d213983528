"""Intervals over seeds, and runs paired by seed."""

import math

import numpy as np
import pytest
from scipy import stats

from forde_fast.evaluation import interval, paired


def test_interval_is_students():
    values = np.random.default_rng(0).normal(3, 2, 7)
    got = interval(values, level=0.9)
    low, high = stats.t.interval(0.9, 6, values.mean(), stats.sem(values))
    expected = {"mean": values.mean(), "deviation": values.std(ddof=1), "low": low, "high": high, "count": 7}
    assert got == pytest.approx(expected)


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).normal(5, 1, (2000, 4))
    covered = [found["low"] <= 5 <= found["high"] for found in map(interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 2000))


def test_pairs_are_made_by_seed():
    draw = np.random.default_rng(2)
    easy, effect = draw.normal(0, 10, 6), draw.normal(0.3, 0.1, 6)  # seeds differ more than methods do
    ours = {seed: easy[seed] + effect[seed] for seed in range(6)}
    theirs = {seed: easy[seed] for seed in reversed(range(6))}
    got = paired(ours, theirs)
    test = stats.ttest_rel([ours[s] for s in range(6)], [theirs[s] for s in range(6)])
    low, high = test.confidence_interval(0.95)
    assert [got["mean"], got["low"], got["high"]] == pytest.approx([effect.mean(), low, high])
    assert got["p"] == pytest.approx(test.pvalue)
    assert got["low"] > 0


def test_few_and_equal_values():
    assert interval([2.0]) == {"mean": 2, "deviation": 0, "low": -math.inf, "high": math.inf, "count": 1}
    same = paired({0: 1.5, 1: 2.5}, {0: 1.5, 1: 2.5})
    assert (same["low"], same["high"], same["p"]) == (0, 0, 1)
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})["p"] == 0
    assert math.isnan(paired({0: 2.0}, {0: 1.0})["p"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "values: expected a list of numbers, not empty"),
        (lambda: interval([1.0, math.nan]), "values: expected finite numbers"),
        (lambda: interval([1.0], level=95), "level: expected a number between 0 and 1, got 95"),
        (lambda: paired({0: 1.0, 1: 1.0}, {1: 1.0, 2: 0.0}), "baseline: expected runs of the same seeds.*got 0, 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
