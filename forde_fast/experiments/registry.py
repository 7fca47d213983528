"""The experiments by name: each a function of a `Lab` that draws figures into its folder and returns a text."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

# where they are: imported when one is asked for, so that the command line starts at once
EXPERIMENTS = {
    "lengthscale": "sweeps.lengthscale",
    "size": "sweeps.size",
    "basis": "sweeps.basis",
    "bandwidth": "sweeps.bandwidth",
    "cost": "sweeps.cost",
    "severity": "robustness.severity",
    "corruptions": "robustness.corruptions",
    "ood": "robustness.unknown",
    "activation-maps": "pictures.activation_maps",
    "regression": "pictures.regression",
    "classification": "pictures.classification",
}
TOYS = ("regression", "classification")  # on points of their own: a lab's data and setting are not for them


def find(name: str) -> Callable:
    module, function = EXPERIMENTS[name].split(".")
    return getattr(importlib.import_module(f"forde_fast.experiments.{module}"), function)


def run(name: str, lab) -> str:
    """The page of one experiment in a `Lab`, which is written into its folder too."""
    experiment = find(name)
    body = experiment(lab)
    about = " ".join(experiment.__doc__.split())
    if name not in TOYS:
        used = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(lab.setting).items())
        about += f"\n\nMeans over seeds, ± the half width of a 95 % interval. Setting: {used}."
    text = f"# {name}\n\n{about}\n\n{body}\n"
    lab.write(f"{name}.md", text)
    return text
