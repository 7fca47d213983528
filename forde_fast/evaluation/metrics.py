"""Accuracy, negative log-likelihood, calibration error and Brier score of predicted probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from forde_fast.evaluation.checks import Array, as_labels, as_probs
from forde_fast.evaluation.diversity import pair_disagreement
from forde_fast.evaluation.uncertainty import decompose
from forde_fast.validation import expect

BINS = 15  # of the calibration error, as in the paper's tables
METRICS = ("accuracy", "nll", "ece", "brier")


def score(probs: Array, labels: Array) -> dict[str, float]:
    """Score probabilities [B, K], rows summing to 1, against integer labels [B].

    Returns Python floats:
    - accuracy: the share of samples whose largest probability (the first of equal ones) is the label's.
    - nll: the mean of -log p_y in nats. p_y is held at the smallest normal number of the dtype given, so that
      a probability of 0 costs 87.3 nats in float32 and 708.4 in float64 instead of infinity.
    - ece: Σ_bins share · |accuracy − mean confidence| over 15 equal bins (lo, hi] of the largest probability
      (Guo et al. 2017, eq. 3). The edges are rounded to the dtype given: a float32 0.2 lies on the edge 3/15.
    - brier: the mean over samples of Σ_k (p_k − [k = y])², from 0 to 2 (Brier 1950).

    Raises TypeError for a wrong type or dtype; ValueError for wrong shapes, an empty batch, labels outside
    [0, K), probabilities that are negative, above 1 or not finite, rows whose sum is off 1 by more than 1e-3.
    """
    probs = as_probs(probs, "probs", "B, K")
    labels = as_labels(labels, *probs.shape)
    return _Sums().add(probs.double(), labels, probs.dtype).result()


def score_members(member_probs: Array, labels: Array) -> dict:
    """Score an ensemble, {"ensemble": score of the members' mean, "members": [score of each]}.

    member_probs [M, B, K], labels [B]; errors as in `score`.
    """
    member_probs = as_probs(member_probs, "member_probs", "M, B, K")
    labels = as_labels(labels, *member_probs.shape[1:])
    members, dtype = member_probs.double(), member_probs.dtype
    return {
        "ensemble": _Sums().add(members.mean(0), labels, dtype).result(),
        "members": [_Sums().add(member, labels, dtype).result() for member in members],
    }


class Scorer:
    """Scores an ensemble on samples that come in parts, of which it keeps sums only.

    scorer = Scorer()
    for x, y in loader:
        scorer.add(ensemble.predict_members(x), y)
    scorer.result()
    """

    def __init__(self):
        self._scores = _Sums()
        self._sums = dict.fromkeys(("total", "aleatoric", "epistemic", "disagreement"), 0.0)

    def add(self, member_probs: Array, labels: Array) -> Scorer:
        """member_probs [M, B, K], labels [B]; errors as in `score`."""
        member_probs = as_probs(member_probs, "member_probs", "M, B, K")
        labels = as_labels(labels, *member_probs.shape[1:])
        members = member_probs.double()
        self._scores.add(members.mean(0), labels, member_probs.dtype)
        for name, values in (*decompose(members).items(), ("disagreement", pair_disagreement(members))):
            self._sums[name] += values.sum().item()
        return self

    def result(self) -> dict[str, float]:
        """`score` of the members' mean; means over the samples of total, aleatoric and epistemic uncertainty in
        nats (see `uncertainty`) and of the members' disagreement. Raises ValueError where nothing was added."""
        return {**self._scores.result(), **{name: s / self._scores.count for name, s in self._sums.items()}}


class _Sums:
    """What `score` needs of all samples: four sums, the calibration error's for each bin."""

    def __init__(self):
        self.count = 0
        self.right = self.nll = self.brier = 0.0
        self.bins = torch.zeros(BINS, dtype=torch.float64, device="cpu")

    def add(self, probs: Tensor, labels: Tensor, dtype: torch.dtype) -> _Sums:
        """probs float64 [B, K], labels int64 [B], dtype the one that the probs came in."""
        confidence, predicted = probs.max(1)
        correct = (predicted == labels).double()
        true = probs.gather(1, labels[:, None])
        error = probs.scatter_add(1, labels[:, None], -torch.ones_like(true))
        self.count += len(labels)
        self.right += correct.sum().item()
        self.nll -= true.clamp(min=torch.finfo(dtype).tiny).log().sum().item()
        self.brier += error.square().sum().item()
        inner_edges = (torch.arange(1, BINS, device="cpu").double() / BINS).to(dtype).double()
        bins = torch.bucketize(confidence, inner_edges)  # bin b holds edge b-1 < confidence <= edge b
        # share · (accuracy − confidence) of a bin is the sum of its differences over B
        self.bins.index_add_(0, bins, correct - confidence)
        return self

    def result(self) -> dict[str, float]:
        expect(self.count > 0, "scores", "at least one sample", "none")
        sums = {"accuracy": self.right, "nll": self.nll, "ece": self.bins.abs().sum().item(), "brier": self.brier}
        return {name: value / self.count for name, value in sums.items()}
