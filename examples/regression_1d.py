"""Regression in one dimension: members that agree where there are data and part where there are none.

Run: python examples/regression_1d.py [figure.png]

An input of one value has a gradient of norm 1 whatever it is, once normalised: nothing would be left to compare.
So `normalize=False`, and what is compared is the slope of each member's function.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

import forde_fast as ff


def main(path: str | None = None):
    torch.manual_seed(0)
    x = torch.cat([torch.rand(40, 1) * 2 - 3, torch.rand(40, 1) * 2 + 1])  # nothing between -1 and 1
    y = torch.sin(2 * x) + 0.1 * torch.randn_like(x)

    slope = ff.InputGradients(score=lambda outputs, y: outputs[:, 0])
    spread = {}
    for name, weight in (("deep ensemble", 0.0), ("FoRDE", 2.0)):
        ensemble = ff.Ensemble(lambda: nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), members=5)
        trainer = ff.Trainer(
            ensemble,
            ff.Method(slope, normalize=False),
            repulsion_weight=weight,
            loss=F.mse_loss,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
            strategy="stacked",  # networks as small as these are computed together
        )
        trainer.fit([(x, y)] * 25, epochs=10)
        with torch.no_grad():
            grid = torch.linspace(-4, 4, 161)[:, None]
            functions = ensemble(grid)[..., 0]  # [M, 161]
            gap, seen = functions.std(0)[70:91].mean(), ensemble(x)[..., 0].std(0).mean()
        spread[name] = float(gap), float(seen)
        print(f"{name}: members differ by {gap:.3f} between the data, {seen:.3f} on them")
        if path is not None:
            draw(path.replace(".png", f"-{name.split()[0]}.png"), x, y, grid, functions, name)
    return spread


def draw(path, x, y, grid, functions, title):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(title=title, ylim=(-3, 3))
    axes.plot(grid[:, 0], functions.T, linewidth=1)
    axes.plot(x[:, 0], y[:, 0], "k.", markersize=4)
    figure.savefig(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
