"""How good predicted probabilities are and what their uncertainty is worth; how runs compare.

Everything is computed in float64 on the CPU, whatever device and dtype the numbers come in. Nothing here knows how
an ensemble was trained: probabilities [M, B, K], input gradients [M, B, D] and scores by seed are all that is asked.
"""

from forde_fast.evaluation.calibration import calibrated_nll, fit_temperature, temper
from forde_fast.evaluation.checks import Array, as_labels, as_probs
from forde_fast.evaluation.comparison import interval, paired
from forde_fast.evaluation.corrupted import averages, evaluate_corruptions, mean_scores, score_corrupted
from forde_fast.evaluation.detection import auroc, detection, fpr95, selective_risk
from forde_fast.evaluation.diversity import (
    disagreement,
    gradient_cosine,
    input_gradients,
    kernel_similarity,
)
from forde_fast.evaluation.metrics import BINS, METRICS, Scorer, score, score_members
from forde_fast.evaluation.uncertainty import decompose, uncertainty

__all__ = [
    "BINS",
    "METRICS",
    "Array",
    "Scorer",
    "as_labels",
    "as_probs",
    "auroc",
    "averages",
    "calibrated_nll",
    "decompose",
    "detection",
    "disagreement",
    "evaluate_corruptions",
    "fit_temperature",
    "fpr95",
    "gradient_cosine",
    "input_gradients",
    "interval",
    "kernel_similarity",
    "mean_scores",
    "paired",
    "score",
    "score_corrupted",
    "score_members",
    "selective_risk",
    "temper",
    "uncertainty",
]
