"""What an uncertainty is worth: telling unknown inputs from known ones, and wrong predictions from right ones."""

import math

import numpy as np
import torch
from torch import Tensor

from forde_fast.evaluation.checks import Array, as_numbers
from forde_fast.validation import expect


def detection(known: Array, unknown: Array) -> dict[str, float]:
    """{"auroc", "fpr95"} of an uncertainty [B] on in-distribution samples and [C] on out-of-distribution ones."""
    return {"auroc": auroc(known, unknown), "fpr95": fpr95(known, unknown)}


def auroc(known: Array, unknown: Array) -> float:
    """The chance that an unknown sample is more uncertain than a known one, equal ones counting half.

    known [B] and unknown [C] are uncertainties: 1 is perfect, 0.5 is chance. Raises TypeError and ValueError for
    what is no such tensor of finite numbers.
    """
    from scipy.stats import rankdata

    known, unknown = as_numbers(known, "known", "B").numpy(), as_numbers(unknown, "unknown", "C").numpy()
    ranks = rankdata(np.concatenate([known, unknown]))[len(known) :]
    wins = ranks.sum() - len(unknown) * (len(unknown) + 1) / 2  # Mann and Whitney's U
    return float(wins / (len(known) * len(unknown)))


def fpr95(known: Array, unknown: Array) -> float:
    """The share of unknown samples taken for known ones where 95 % of the known ones are taken for known.

    The threshold is the least uncertainty that at least 95 % of `known` [B] do not exceed; `unknown` [C] that do
    not exceed it either are false positives (Hendrycks & Gimpel 2017; Liang et al. 2018). Errors as in `auroc`.
    """
    known, unknown = as_numbers(known, "known", "B"), as_numbers(unknown, "unknown", "C")
    threshold = known.sort().values[math.ceil(0.95 * len(known)) - 1]
    return (unknown <= threshold).double().mean().item()


def selective_risk(uncertainty: Array, correct: Array) -> dict[str, Tensor | float]:
    """The error among the samples that are kept when the most uncertain ones are refused.

    uncertainty [B]; correct [B], boolean or 0 and 1. Returns coverage [B] and risk [B], float64: of the k least
    uncertain samples, k = 1 to B; and aurc, the mean of risk, the area under the curve (Geifman & El-Yaniv 2017).
    Equally uncertain samples are refused in no particular order: each counts with their mean error.
    """
    doubt, right = as_numbers(uncertainty, "uncertainty", "B"), as_numbers(correct, "correct", "B")
    expect(len(right) == len(doubt), "correct", f"one per sample, {len(doubt)}", len(right))
    expect(bool(((right == 0) | (right == 1)).all()), "correct", "0 and 1, or booleans", "other numbers")
    _, group, sizes = doubt.unique(return_inverse=True, return_counts=True)
    errors = doubt.new_zeros(len(sizes)).index_add(0, group, 1 - right) / sizes
    kept = torch.arange(1, len(doubt) + 1, dtype=torch.float64, device=doubt.device)
    risk = errors.repeat_interleave(sizes).cumsum(0) / kept
    return {"coverage": kept / len(doubt), "risk": risk, "aurc": risk.mean().item()}
