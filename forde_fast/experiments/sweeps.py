"""Lengthscale and weight, ensemble size, basis, bandwidth, cost: what training is given, against what comes out."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from torch import Tensor

from forde_fast.evaluation import score, score_corrupted
from forde_fast.evaluation.corrupted import mean_scores
from forde_fast.experiments import figures
from forde_fast.experiments.lab import Lab, Trained, shown
from forde_fast.experiments.summary import interval, markdown_table
from forde_fast.lengthscales import PCA, Cosine, Identity
from forde_fast.methods import Method
from forde_fast.spaces import InputGradients
from forde_fast.timing import interleaved, ratio

ALPHAS = (0.0, 0.1, 0.2, 0.4, 0.8, 1.0)  # the paper's
STRENGTHS = (0.05, 0.25, 1.0, 4.0)  # of the setting's repulsion_weight
SIZES = (2, 5, 10, 20)
COLUMNS = ("accuracy", "NLL", "cA", "cNLL", "cA, severities 1-3", "cA, severities 4-5")
COMPARED = ("de", "weight-rde", "function-rde", "feature-rde", "lit", "gal", "forde-identity", "forde-pca")


def scores(lab: Lab, trained: Trained) -> dict[str, float]:
    """COLUMNS, accuracies in %."""
    clean = score(lab.predict(trained.ensemble, lab.data.test_images).mean(0), lab.data.test_labels)
    found = score_corrupted(lambda images: lab.predict(trained.ensemble, images), lab.corrupted())
    by_name = found["by_corruption"]
    mild, hard = (mean_scores(by_name, by_name, part)["accuracy"] for part in ((1, 2, 3), (4, 5)))
    numbers = (100 * clean["accuracy"], clean["nll"], 100 * found["accuracy"], found["nll"], 100 * mild, 100 * hard)
    return dict(zip(COLUMNS, numbers, strict=True))


def _table(first: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """rows: name -> one dict per seed."""
    lines = [
        [name, *(shown([own[column] for own in runs], 3 if "NLL" in column else 1) for column in COLUMNS)]
        for name, runs in rows.items()
    ]
    return markdown_table([first, *COLUMNS], lines)


def _add(panels: dict, columns: tuple[str, ...], label: str, x: float, runs: list[dict[str, float]]) -> None:
    """A point, with its interval, to the line `label` of each column's panel."""
    for column in columns:
        line = panels.setdefault(column, {}).setdefault(label, ([], [], []))
        for to, number in zip(line, (x, *interval([run[column] for run in runs])), strict=True):
            to.append(number)


def lengthscale(lab: Lab) -> str:
    """FoRDE-Tuned over alpha in both forms of the blend, and over repulsion_weight at alpha 0, 0.4 and 1."""
    scale, weight = PCA.fit(lab.x), lab.setting.repulsion_weight
    found: dict[tuple, list[dict[str, float]]] = {}

    def scored(alpha: float, form: str, weight: float) -> list[dict[str, float]]:
        form = form if 0 < alpha < 1 else "arithmetic"  # at its ends a blend has one form
        key = alpha, form, weight
        if key not in found:
            own, title = Method(InputGradients(), lengthscale=scale.blend(alpha, form)), f"alpha {alpha:g}, {form}"
            runs = (lab.train(own, seed, weight, title=f"{title}, w {weight:g}") for seed in lab.seeds)
            found[key] = [scores(lab, trained) for trained in runs]
        return found[key]

    rows, lines = {}, {}
    for form in ("arithmetic", "harmonic"):
        for alpha in ALPHAS:
            runs = rows[f"alpha {alpha:g}, {form}"] = scored(alpha, form, weight)
            _add(lines, COLUMNS, form, alpha, runs)
    figures.curves(lines, lab.out / "alpha.png", "alpha")
    strengths = {
        f"alpha {alpha:g}, w {factor * weight:g}": scored(alpha, "arithmetic", factor * weight)
        for alpha in (0.0, 0.4, 1.0)
        for factor in STRENGTHS
    }
    return f"{_table('lengthscale', rows)}\n\n![alpha](alpha.png)\n\n{_table('strength', strengths)}"


def size(lab: Lab) -> str:
    """Ensembles of 2 to 20 members, with and without repulsion."""
    rows, lines = {}, {}
    for members in SIZES:
        for name in ("de", "forde-pca"):
            title = f"{name}, {members} members"
            rows[title] = [scores(lab, lab.train(name, seed, members=members, title=title)) for seed in lab.seeds]
            _add(lines, COLUMNS[:4], name, members, rows[title])
    figures.curves(lines, lab.out / "size.png", "members", SIZES)
    return f"{_table('ensemble', rows)}\n\n![size](size.png)"


def basis(lab: Lab) -> str:
    """The eigenvectors of the images against the discrete cosines, each with the images' variance along them; and
    either basis with the other's weights in order, which separates the directions from the weights."""
    pca, cosine = PCA.fit(lab.x), Cosine.fit(lab.x)
    spectrum = pca.eigenvalues
    eye = torch.eye(lab.x[0].numel(), dtype=torch.float64)
    matrix = cosine.product(eye)  # C of the cosines: their variances in order are its eigenvalues
    variances, directions = torch.linalg.eigh((matrix + matrix.T) / 2)
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    scales = {
        "identity": Identity(),
        "PCA": pca,
        "cosines": cosine,
        "PCA's directions, cosines' variances": PCA(pca.eigenvectors, variances),
        "cosines, PCA's variances": PCA(directions, spectrum),
    }
    rows = {"deep ensemble": [scores(lab, lab.train("de", seed)) for seed in lab.seeds]}
    for title, scale in scales.items():
        own = Method(InputGradients(), lengthscale=scale)
        rows[title] = [scores(lab, lab.train(own, seed, title=title)) for seed in lab.seeds]
    share = {name: np.cumsum(v.numpy()) / float(v.sum()) for name, v in (("PCA", spectrum), ("cosines", variances))}
    panel = {"share of the variance": {name: (np.arange(1, len(v) + 1), v) for name, v in share.items()}}
    figures.curves(panel, lab.out / "spectrum.png", "directions")
    return f"{_table('lengthscale', rows)}\n\n![spectrum](spectrum.png)"


def bandwidth(lab: Lab) -> str:
    """Median distance, mean kernel and cosine through training, over seeds."""
    titles = {"bandwidth_median": "median squared distance", "kernel_mean": "mean kernel between members",
              "gradient_cosine": "cosine between members' input gradients"}  # fmt: skip
    panels: dict[str, dict] = {title: {} for title in titles.values()}
    rows = []
    for name in ("forde-identity", "forde-tuned", "forde-pca"):
        logs = [lab.train(name, seed).log for seed in lab.seeds]
        for key, title in titles.items():
            values = np.stack([log[key] for log in logs])
            unit = values[:, :1] if key == "bandwidth_median" else 1.0  # distances under PCA have another scale
            mean = (values / unit).mean(0)
            panels[title][name] = (np.arange(1, len(mean) + 1), mean)
        rows.append([name, *(shown([log[key][-len(log[key]) // 10 :].mean() for log in logs]) for key in titles)])
    panels["median squared distance, over its first"] = panels.pop("median squared distance")
    figures.curves(panels, lab.out / "bandwidth.png", "step")
    table = markdown_table(["method", *titles.values()], rows)
    return f"Mean of the last tenth of the steps:\n\n{table}\n\n![traces](bandwidth.png)"


def cost(lab: Lab) -> str:
    """Time and memory of a step of each method beside what a training with it scores."""
    measured, rows = steps(lab), []
    for name, (ms, over, memory) in measured.items():
        runs = [scores(lab, lab.train(name, seed)) for seed in lab.seeds]
        cells = [f"{ms:.1f}", f"{over:.2f}", f"{memory:.1f}"]
        rows.append([name, *cells, *(shown([r[c] for r in runs], 3 if "NLL" in c else 1) for c in COLUMNS[:4])])
    panel = {name: (over, np.nan) for name, (_, over, _) in measured.items()}
    figures.points({"time of a step, over the deep ensemble's": panel}, lab.out / "cost.png")
    head = ["method", "ms a step", "over de", "MiB", *COLUMNS[:4]]
    note = "Times are medians of rounds in which all take turns, the ratio round by round; memory is a loop's."
    return f"{note}\n\n{markdown_table(head, rows)}\n\n![cost](cost.png)"


def steps(lab: Lab, rounds: int = 9) -> dict[str, tuple[float, float, float]]:
    """{method: (ms of a step, the same over the deep ensemble's, MiB)}."""
    x, y = lab.x[: lab.setting.batch_size], lab.y[: lab.setting.batch_size]
    trainers = {name: lab.trainer(name) for name in COMPARED}
    for trainer in trainers.values():
        for _ in range(3):  # on a GPU the third step of a kind is the first recorded one
            trainer.step(x, y)
    calls = {name: lambda trainer=trainer: trainer.step(x, y) for name, trainer in trainers.items()}
    times = interleaved(calls, rounds, lab.device.type)
    return {
        name: (1e3 * statistics.median(own), ratio(own, times["de"]), _memory(lab, name, x, y))
        for name, own in times.items()
    }


def _memory(lab: Lab, name: str, x: Tensor, y: Tensor) -> float:
    """MiB at the most in a step: all of the device's, or on a CPU what autograd's graphs keep."""
    trainer = lab.trainer(name, strategy="loop")
    if lab.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lab.device)
        trainer.step(x, y)
        return torch.cuda.max_memory_allocated(lab.device) / 2**20
    bytes_now = most = 0

    class Kept:
        def __init__(self, tensor: Tensor):
            nonlocal bytes_now, most
            self.tensor = tensor.detach()  # an output with its graph would hold itself
            bytes_now += tensor.nbytes
            most = max(most, bytes_now)

        def __del__(self):
            nonlocal bytes_now
            bytes_now -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        trainer.step(x, y)
    return most / 2**20
