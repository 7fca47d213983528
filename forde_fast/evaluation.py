"""How good predicted probabilities are: accuracy, NLL, ECE, Brier; uncertainties; corrupted images.

Everything is computed in float64 on the CPU, whatever device and dtype the probabilities come in.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from forde_fast.validation import expect, finite, labels_in_range, one_of

BINS = 15  # of the calibration error, as in the paper's tables
METRICS = ("accuracy", "nll", "ece", "brier")
_SUM_TOLERANCE = 1e-3  # on the sum of a row: float32 passes easily, bfloat16 and logits do not

Array = Tensor | np.ndarray


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
    return _score(probs.double(), labels, probs.dtype)


def score_members(member_probs: Array, labels: Array) -> dict:
    """Score an ensemble, {"ensemble": score of the members' mean, "members": [score of each]}.

    member_probs [M, B, K], labels [B]; errors as in `score`.
    """
    member_probs = as_probs(member_probs, "member_probs", "M, B, K")
    labels = as_labels(labels, *member_probs.shape[1:])
    members = member_probs.double()
    return {
        "ensemble": _score(members.mean(0), labels, member_probs.dtype),
        "members": [_score(member, labels, member_probs.dtype) for member in members],
    }


def uncertainty(member_probs: Array) -> dict[str, Tensor]:
    """Uncertainty of each sample in nats, as float64 tensors [B], of an ensemble's member_probs [M, B, K].

    total is the entropy of the members' mean, aleatoric the mean of the members' entropies, epistemic their
    difference: the mutual information of label and member, from 0 to log M (Depeweg et al. 2018). Errors as
    in `score`.
    """
    return decompose(as_probs(member_probs, "member_probs", "M, B, K").double())


def decompose(members: Tensor) -> dict[str, Tensor]:
    """`uncertainty` of probabilities [M, B, K] that need no check, in their dtype and on their device."""
    total = torch.special.entr(members.mean(0)).sum(1)
    aleatoric = torch.special.entr(members).sum(2).mean(0)
    # zero for members that agree, where the difference of two roundings may be negative
    return {"total": total, "aleatoric": aleatoric, "epistemic": (total - aleatoric).clamp(min=0)}


def evaluate_corruptions(
    member_probs_of: Callable[[Array], Array],
    images: Array,
    labels: Array,
    names: Sequence[str],
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    preset: str = "cifar",
    seed: int = 0,
) -> dict:
    """Score an ensemble's mean on corrupted copies of uint8 images [N, H, W] or [N, H, W, C].

    `member_probs_of` takes corrupted images, uint8 like `images`, and returns [M, N, K]. The corruptions,
    severities, seed and preset are those of `forde_fast.data.corruptions.corrupt`.

    Returns the means over all names and severities of `score`'s numbers (the tables' cA is "accuracy", cNLL
    "nll", cECE "ece") and the scores themselves, "by_corruption": {name: {severity: score}}. Raises, before
    any work, ValueError for an unknown corruption or one named twice and TypeError for names or severities
    that are no list; else as `corrupt` and `score_members` do.
    """
    from forde_fast.data.corruptions import CORRUPTIONS, corrupt

    _check_choices("names", names)
    _check_choices("severities", severities)
    for name in names:
        one_of(name, "names", CORRUPTIONS)
    made = ((n, s, corrupt(images, n, s, seed=seed, preset=preset), labels) for n in names for s in severities)
    return score_corrupted(member_probs_of, made)


def score_corrupted(member_probs_of: Callable[[Array], Array], corrupted: Iterable[tuple]) -> dict:
    """Score an ensemble's mean on what `corrupted` yields, (name, severity, images, labels), such as
    `data.CorruptedFiles`; returns what `evaluate_corruptions` does, which makes its own."""
    by_corruption: dict[str, dict] = {}
    for name, severity, images, labels in corrupted:
        scores = score_members(member_probs_of(images), labels)
        by_corruption.setdefault(name, {})[severity] = scores["ensemble"]
    return {**mean_scores(by_corruption, by_corruption), "by_corruption": by_corruption}


def mean_scores(by_corruption: dict, names: Iterable[str]) -> dict[str, float]:
    """The mean of each metric over all severities of the corruptions `names`."""
    everything = [scores for name in names for scores in by_corruption[name].values()]
    return {metric: sum(scores[metric] for scores in everything) / len(everything) for metric in METRICS}


def _score(probs: Tensor, labels: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The numbers of `score`: probs float64 [B, K], labels int64 [B], dtype the one the probs came in."""
    confidence, predicted = probs.max(1)
    correct = (predicted == labels).double()
    true = probs.gather(1, labels[:, None])
    error = probs.scatter_add(1, labels[:, None], -torch.ones_like(true))
    return {
        "accuracy": correct.mean().item(),
        "nll": -true.clamp(min=torch.finfo(dtype).tiny).log().mean().item(),
        "ece": _calibration_error(confidence, correct, dtype),
        "brier": error.square().sum(1).mean().item(),
    }


def _calibration_error(confidence: Tensor, correct: Tensor, dtype: torch.dtype) -> float:
    inner_edges = (torch.arange(1, BINS).double() / BINS).to(dtype).double()
    bins = torch.bucketize(confidence, inner_edges)  # bin b holds edge b-1 < confidence <= edge b
    # share · (accuracy − confidence) of a bin is the sum of its differences over B
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return (sums.abs().sum() / len(confidence)).item()


def as_probs(probs: Array, name: str, shape: str) -> Tensor:
    """`probs` on the CPU, checked: as many dimensions as `shape` has names, the last one a distribution."""
    known = isinstance(probs, Tensor | np.ndarray)
    expect(known, name, "a tensor or array", type(probs).__name__, error=TypeError)
    tensor = _to_cpu(probs)
    expect(tensor.is_floating_point(), name, "a floating dtype", probs.dtype, error=TypeError)
    rank = shape.count(",") + 1
    expect(tensor.ndim == rank, name, f"{rank} dimensions [{shape}]", f"shape {list(tensor.shape)}")
    expect(tensor.numel() > 0, name, f"at least one of each of {shape}", f"shape {list(tensor.shape)}")
    finite(tensor, name)
    low, high = (bound.item() for bound in tensor.aminmax())
    expect(low >= 0 and high <= 1 + _SUM_TOLERANCE, name, "values in [0, 1]", f"{low:g} to {high:g}")
    sums = tensor.double().sum(-1)
    worst = sums.flatten()[(sums - 1).abs().argmax()].item()
    normal = abs(worst - 1) <= _SUM_TOLERANCE
    expect(normal, name, f"rows summing to 1 within {_SUM_TOLERANCE}", f"a sum of {worst:g}")
    return tensor


def as_labels(labels: Array, samples: int, classes: int) -> Tensor:
    """`labels` on the CPU as int64 [samples], checked: integers in [0, classes)."""
    known = isinstance(labels, Tensor | np.ndarray)
    expect(known, "labels", "a tensor or array", type(labels).__name__, error=TypeError)
    tensor = _to_cpu(labels)
    labels_in_range(tensor, classes)
    expect(len(tensor) == samples, "labels", f"B = {samples} as the probabilities", f"B = {len(tensor)}")
    return tensor.long()


def _to_cpu(array: Array) -> Tensor:
    # a copy in C order: torch takes neither negative strides nor, silently, a read-only array
    return array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array, order="C"))


def _check_choices(name: str, values: Sequence) -> None:
    known = isinstance(values, Sequence) and not isinstance(values, str)
    expect(known, name, "a list", repr(values), error=TypeError)
    expect(0 < len(values) == len(set(values)), name, "at least one, each once", list(values))
