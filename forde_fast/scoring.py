"""The scores of a trained run: clean, under corruption, on unknown images; what goes into metrics.json."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from forde_fast.data import CORRUPTIONS, corrupt
from forde_fast.data.corrupted import SEVERITIES
from forde_fast.data.corruptions import HARDER
from forde_fast.evaluation import (
    averages,
    calibrated_nll,
    detection,
    disagreement,
    fit_temperature,
    gradient_cosine,
    input_gradients,
    kernel_similarity,
    score,
    score_corrupted,
    score_members,
    selective_risk,
    temper,
    uncertainty,
)

GRADIENT_IMAGES = 1000  # of which the members' input gradients are compared
KEPT_BYTES = 2 << 20  # the most that a test set may have whose 115 corrupted copies are kept
UNCERTAINTIES = ("total", "epistemic")


def score_run(run, corruptions: Sequence[str] = CORRUPTIONS) -> dict:
    """The metrics of a `run.Run`, as groups; `corruptions` are those that are made where no files are given, and
    without any there are no groups of theirs.

    - "clean": `score` of the members' mean, "members": each one's; mean total, aleatoric and epistemic uncertainty;
      "aurc" of the total; "calibrated_nll" with its "temperature", fitted on the validation part where there is one,
      else on other test images than it is scored on.
    - "validation": the same scores of that part.
    - "diversity": the members' disagreement, the cosine between their input gradients, and the kernel exp(-d) of
      those (identity lengthscale, bandwidth 1), on the first 1,000 test images.
    - "corrupted": means over the benchmark's 15 corruptions, with "by_corruption"; "corrupted_all" and
      "corrupted_extra": over all 19, as the paper averages, and over the other 4. From `corrupted_dir`, else made
      here; of files, "images" of each. "corrupted_grey": those that have harder severities for grey images, at these.
    - "ood": for each set of unknown images AUROC and FPR95 by total and by epistemic uncertainty.
    """
    probs = run.predict(run.test_images)
    metrics = {"clean": _clean(probs, run.test_labels)}
    if len(run.valid_labels):
        held = run.predict(run.valid_images)
        metrics["validation"] = flat(score_members(held, run.valid_labels))
        temperature = fit_temperature(held.mean(0), run.valid_labels)
        tempered = score(temper(probs.mean(0), temperature), run.test_labels)
        metrics["clean"] |= {"calibrated_nll": tempered["nll"], "temperature": temperature}
    elif len(run.test_labels) > 1:
        tempered = calibrated_nll(probs.mean(0), run.test_labels)
        metrics["clean"] |= {"calibrated_nll": tempered["nll"], "temperature": tempered["temperature"]}
    metrics["diversity"] = diversity(run, probs)
    metrics |= _corrupted(run, corruptions)
    if run.unknown:
        known = uncertainty(probs)
        metrics["ood"] = {name: _detection(known, run.predict(images)) for name, images in run.unknown.items()}
    return metrics


def flat(scores: dict) -> dict:
    return {**scores["ensemble"], "members": scores["members"]}


def _clean(probs: torch.Tensor, labels: torch.Tensor) -> dict:
    doubt = uncertainty(probs)
    means = {name: values.mean().item() for name, values in doubt.items()}
    aurc = selective_risk(doubt["total"], probs.mean(0).argmax(1) == labels)["aurc"]
    return {**flat(score_members(probs, labels)), **means, "aurc": aurc}


def diversity(run, probs: torch.Tensor) -> dict[str, float]:
    """Of the members on the clean test images, whose probabilities are [M, N, K]."""
    x = run.normalisation(run.test_images[:GRADIENT_IMAGES]).to(run.device)
    gradients = input_gradients(run.ensemble, x, run.test_labels[:GRADIENT_IMAGES].to(run.device)).cpu()
    return {
        "disagreement": disagreement(probs),
        "gradient_cosine": gradient_cosine(gradients),
        "kernel_similarity": kernel_similarity(gradients, bandwidth=1.0),
    }


def _corrupted(run, names: Sequence[str]) -> dict[str, dict]:
    if run.data.table or not names:
        return {}
    if run.corrupted_files is not None:
        found = score_corrupted(run.predict, run.corrupted_files)
    else:
        found = score_corrupted(run.predict, _made(run, names, "cifar"))
    means = averages(found["by_corruption"])
    groups = {"corrupted": {**found, **means.get("standard", means["all"])}, "corrupted_all": means["all"]}
    if run.corrupted_files is not None:
        groups["corrupted"]["images"] = run.corrupted_files.images
    if "extra" in means:
        groups["corrupted_extra"] = means["extra"]
    harder = [name for name in HARDER if name in names]
    if run.corrupted_files is None and run.test_images.ndim == 3 and harder:
        groups["corrupted_grey"] = score_corrupted(run.predict, _made(run, harder, "grey"))
    return groups


def _made(run, names: Sequence[str], preset: str) -> Iterator[tuple]:
    """Copies corrupted here. Those of few images are kept for the process's next run: methods that are compared."""
    images = run.test_images
    kept = images.numel() <= KEPT_BYTES
    pixels, shape = images.numpy().tobytes() if kept else b"", tuple(images.shape)
    wanted = [(name, severity) for name in names for severity in SEVERITIES]
    for name, severity in run.watch(wanted, total=len(wanted)):
        if kept:
            copies = _keep(pixels, shape, name, severity, preset)
        else:
            copies = corrupt(images, name, severity, preset=preset)
        yield name, severity, copies, run.test_labels


@functools.lru_cache(maxsize=len(SEVERITIES) * len(CORRUPTIONS + HARDER))
def _keep(pixels: bytes, shape: tuple[int, ...], name: str, severity: int, preset: str) -> torch.Tensor:
    images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
    return corrupt(images, name, severity, preset=preset)


def _detection(known: dict[str, torch.Tensor], probs: torch.Tensor) -> dict[str, dict[str, float]]:
    unknown = uncertainty(probs)
    return {kind: detection(known[kind], unknown[kind]) for kind in UNCERTAINTIES}
