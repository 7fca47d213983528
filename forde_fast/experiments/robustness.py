"""Corrupted and unknown images: by severity, by corruption, out of distribution."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from forde_fast.data import load_unknown
from forde_fast.evaluation import (
    auroc,
    disagreement,
    fpr95,
    gradient_cosine,
    input_gradients,
    score,
    uncertainty,
)
from forde_fast.experiments import figures
from forde_fast.experiments.lab import Lab, shown
from forde_fast.experiments.summary import interval, markdown_table

METHODS = ("de", "forde-identity", "forde-tuned", "forde-pca")
MOST = 1000  # images of which input gradients are taken


def severity(lab: Lab) -> str:
    """Cosine distance between members' input gradients, disagreement and epistemic uncertainty per severity."""
    titles = ("accuracy", "cosine distance of input gradients", "disagreement", "epistemic uncertainty, nats")
    panels: dict[str, dict] = {title: {} for title in titles}
    rows = []
    for name in METHODS:
        runs = [_by_severity(lab, name, seed) for seed in lab.seeds]
        for number, title in enumerate(titles):
            values = [[run[s][number] for run in runs] for s in range(6)]
            found = [interval(own) for own in values]
            panels[title][name] = (range(6), [one.mean for one in found], [one.half for one in found])
            rows.append([f"{name}: {title}", *(shown(own) for own in values)])
    figures.curves(panels, lab.out / "severity.png", "severity", range(6))
    rows.sort(key=lambda row: titles.index(row[0].split(": ")[1]))
    return f"{markdown_table(['', *map(str, range(6))], rows)}\n\n![severity](severity.png)"


def _by_severity(lab: Lab, name: str, seed: int) -> list[tuple[float, ...]]:
    """For severities 0 (clean) to 5, means over corruptions of accuracy, distance, disagreement and uncertainty."""
    ensemble = lab.train(name, seed).ensemble
    found: dict[int, list] = {0: [_seen(lab, ensemble, lab.data.test_images, lab.data.test_labels)]}
    for _, level, images, labels in lab.corrupted():
        found.setdefault(level, []).append(_seen(lab, ensemble, images, labels))
    return [tuple(statistics.fmean(one) for one in zip(*found[level], strict=True)) for level in range(6)]


def _seen(lab: Lab, ensemble, images: Tensor, labels: Tensor) -> tuple[float, ...]:
    probabilities = lab.predict(ensemble, images)
    x, y = lab.normalise(images[:MOST]).to(lab.device), labels[:MOST].to(lab.device)
    distance = 1 - gradient_cosine(input_gradients(ensemble, x, y))
    epistemic = float(uncertainty(probabilities)["epistemic"].mean())
    return score(probabilities.mean(0), labels)["accuracy"], distance, disagreement(probabilities), epistemic


def corruptions(lab: Lab) -> str:
    """Identity against PCA under every corruption, paired by seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in lab.seeds:
        ensembles = {name: lab.train(name, seed).ensemble for name in ("de", "forde-identity", "forde-pca")}
        own: dict[str, dict[str, list[float]]] = {}
        for name, _, images, labels in lab.corrupted():
            for method, ensemble in ensembles.items():
                accuracy = 100 * score(lab.predict(ensemble, images).mean(0), labels)["accuracy"]
                own.setdefault(name, {}).setdefault(method, []).append(accuracy)
        for name, methods in own.items():
            for method, values in methods.items():
                found.setdefault(name, {}).setdefault(method, []).append(statistics.fmean(values))
    rows, bars = [], {}
    for name, own in found.items():
        differences = [a - b for a, b in zip(own["forde-pca"], own["forde-identity"], strict=True)]
        bars[name] = interval(differences)
        rows.append([name, *(shown(own[method], 1) for method in own), shown(differences, 2)])
    figures.points({"accuracy of PCA − identity, points": bars}, lab.out / "corruptions.png")
    table = markdown_table(["corruption", "de", "forde-identity", "forde-pca", "PCA − identity"], rows)
    return f"{table}\n\n![corruptions](corruptions.png)"


def unknown(lab: Lab) -> str:
    """Telling test images from noise, from images of other data, and from shuffled pixels, by uncertainty."""
    sets = _unknown_images(lab)
    rows, panels = [], {}
    for name in METHODS:
        ensembles = [lab.train(name, seed).ensemble for seed in lab.seeds]
        for kind in ("total", "epistemic"):
            known = [_uncertain(lab, e, lab.data.test_images, kind) for e in ensembles]
            cells = []
            for title, images in sets.items():
                others = [_uncertain(lab, e, images, kind) for e in ensembles]
                areas = [auroc(a, b) for a, b in zip(known, others, strict=True)]
                rates = [fpr95(a, b) for a, b in zip(known, others, strict=True)]
                cells.append(f"{shown(areas)} / {shown(rates)}")
                panels.setdefault(f"AUROC, {kind}: {title}", {})[name] = interval(areas)
            rows.append([f"{name}, {kind}", *cells])
    figures.points(panels, lab.out / "ood.png")
    head = ["uncertainty of", *(f"{title}: AUROC / FPR95" for title in sets)]
    return f"{markdown_table(head, rows)}\n\n![out of distribution](ood.png)"


def _unknown_images(lab: Lab) -> dict[str, Tensor]:
    """Uint8 images like the test images: no download is needed for any of them."""
    test = lab.data.test_images
    shape, pixels = tuple(test.shape[1:]), test.flatten(1)
    order = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    others = ["noise"] if lab.setting.data == "digits" else ["noise", "digits"]
    sets = {name: torch.from_numpy(load_unknown(name, shape, count=len(test))) for name in others}
    return sets | {"shuffled pixels": pixels.gather(1, order).view(test.shape)}


def _uncertain(lab: Lab, ensemble, images: Tensor, kind: str) -> Tensor:
    return uncertainty(lab.predict(ensemble, images))[kind]
