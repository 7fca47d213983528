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


def find(name: str) -> Callable:
    module, function = EXPERIMENTS[name].split(".")
    return getattr(importlib.import_module(f"forde_fast.experiments.{module}"), function)


def run(name: str, lab) -> str:
    """The page of one experiment in a `Lab`, which is written into its folder too."""
    experiment = find(name)
    body = experiment(lab)
    used = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(lab.setting).items())
    about = " ".join(experiment.__doc__.split())
    means = "Means over seeds, ± the half width of a 95 % interval."
    text = f"# {name}\n\n{about}\n\n{means} Setting: {used}.\n\n{body}\n"
    lab.write(f"{name}.md", text)
    return text
