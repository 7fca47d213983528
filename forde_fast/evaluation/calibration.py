"""One temperature for all of an ensemble's predictions, fitted on other samples than it is scored on."""

import numpy as np
import torch
from torch import Tensor

from forde_fast.evaluation.checks import Array, as_labels, as_probs
from forde_fast.validation import positive, whole

LOWEST, HIGHEST = 1e-2, 1e2  # between which the temperature is sought


def fit_temperature(probs: Array, labels: Array) -> float:
    """T of the least NLL of softmax(log p / T) for probs [B, K], labels [B] (Guo et al. 2017), from 0.01 to 100.

    The ensemble's mean is tempered, after the members were averaged. Errors as in `score`.
    """
    probs = as_probs(probs, "probs", "B, K")
    return _fit(_logs(probs), as_labels(labels, *probs.shape))


def temper(probs: Array, temperature: float) -> Tensor:
    """softmax(log p / T), float64 [B, K]: above 1 it takes confidence away, below 1 it adds some."""
    positive(temperature, "temperature")
    return (_logs(as_probs(probs, "probs", "B, K")) / temperature).softmax(1)


def calibrated_nll(probs: Array, labels: Array, splits: int = 5, seed: int = 0) -> dict[str, float]:
    """{"nll", "temperature"} after temperature scaling, without a validation set: fitted on one half of the samples
    and scored on the other, both ways round, mean over so many random splits (Ashukha et al. 2020).

    It takes out what a worse calibration costs, so that ensembles compare by the rest. probs [B, K] with B >= 2.
    """
    probs = as_probs(probs, "probs", "B, K")
    labels = as_labels(labels, *probs.shape)
    whole(len(probs), "B", 2)
    whole(splits, "splits")
    logs, draw, found = _logs(probs), np.random.default_rng(seed), []
    for _ in range(splits):
        halves = torch.from_numpy(draw.permutation(len(probs))).tensor_split(2)
        for fitted, scored in (halves, halves[::-1]):
            temperature = _fit(logs[fitted], labels[fitted])
            found.append((_nll(logs[scored], labels[scored], temperature), temperature))
    nll, temperature = np.mean(found, axis=0).tolist()
    return {"nll": nll, "temperature": temperature}


def _logs(probs: Tensor) -> Tensor:
    return probs.double().clamp(min=torch.finfo(probs.dtype).tiny).log()  # as `score` holds p away from 0


def _nll(logs: Tensor, labels: Tensor, temperature: float) -> float:
    return torch.nn.functional.cross_entropy(logs / temperature, labels).item()


def _fit(logs: Tensor, labels: Tensor) -> float:
    """The NLL is convex in 1 / T, so that its one valley in log T is found by bisection of the slope."""
    true = logs.gather(1, labels[:, None])[:, 0].mean()

    def slope(inverse: float) -> float:  # of the NLL by 1 / T: expected less true log-probability
        return ((logs * inverse).softmax(1) * logs).sum(1).mean().item() - true.item()

    low, high = np.log(LOWEST), np.log(HIGHEST)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(np.exp(-middle)) > 0 else (low, middle)
    return float(np.exp((low + high) / 2))
