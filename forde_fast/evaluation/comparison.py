"""What a score is over several seeds, and whether two methods differ, run against run of the same seed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from forde_fast.validation import expect


def interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """{"mean", "deviation", "low", "high", "count"} of one score of several seeds.

    low and high bound the mean at that level by Student's t. deviation is the sample's (n − 1), 0 for a single
    value, whose bounds are infinite: one run says nothing of its spread.
    """
    from scipy.stats import t

    expect(0 < level < 1, "level", "a number between 0 and 1", level)
    numbers = np.asarray(values, dtype=np.float64)
    expect(numbers.ndim == 1 and len(numbers) > 0, "values", "a list of numbers, not empty", repr(values))
    expect(bool(np.isfinite(numbers).all()), "values", "finite numbers", repr(values))
    count, mean = len(numbers), float(numbers.mean())
    deviation = float(numbers.std(ddof=1)) if count > 1 else 0.0
    half = t.ppf((1 + level) / 2, count - 1) * deviation / math.sqrt(count) if count > 1 else math.inf
    return {"mean": mean, "deviation": deviation, "low": mean - half, "high": mean + half, "count": count}


def paired(
    values: Mapping[Hashable, float], baseline: Mapping[Hashable, float], level: float = 0.95
) -> dict[str, float]:
    """`interval` of the differences values − baseline, seed by seed, and {"p"} of Student's paired test.

    values and baseline map seeds to one score; runs of one seed start from the same weights and see the same
    batches, so that much of what moves both falls out of their difference. p is 1 where all differences are 0, and
    not a number for a single pair. Raises ValueError unless both have the same seeds.
    """
    from scipy.stats import t

    odd = sorted(map(repr, set(values) ^ set(baseline)))
    expect(not odd, "baseline", "runs of the same seeds as values", f"{', '.join(odd)} in one of them alone")
    found = interval([values[seed] - baseline[seed] for seed in values], level)
    count, spread = found["count"], found["deviation"]
    if count == 1:
        p = math.nan
    elif spread == 0:
        p = 1.0 if found["mean"] == 0 else 0.0
    else:
        p = float(2 * t.sf(abs(found["mean"]) * math.sqrt(count) / spread, count - 1))
    return {**found, "p": p}
