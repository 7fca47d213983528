"""Where members look, and what they know: class-activation maps by depth, 1-D regression, 2-D classification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forde_fast.ensemble import Ensemble
from forde_fast.experiments import figures
from forde_fast.experiments.lab import Lab, shown
from forde_fast.experiments.summary import markdown_table
from forde_fast.methods import METHODS, WHOLE, Method, per_sample
from forde_fast.modes import evaluation_mode
from forde_fast.spaces import InputGradients, Outputs, Weights
from forde_fast.trainer import Trainer

DRAWN = 3  # images
TOY_MEMBERS, TOY_STEPS = 16, 600


def activation_maps(lab: Lab) -> str:
    """Gradient-weighted class-activation maps of the members at several depths, and how far they differ."""
    if lab.setting.model == "mlp":  # which has no maps
        lab.setting = replace(lab.setting, model="cnn", width=4)
    rows, depths = [], []
    images, labels = lab.data.test_images[:200], lab.data.test_labels[:200]
    x, y = lab.normalise(images).to(lab.device), labels.to(lab.device)
    for name in ("de", "forde-identity", "forde-pca"):
        ensembles = [lab.train(name, seed).ensemble for seed in lab.seeds]
        depths = depths_of(ensembles[0].member(0))
        by_depth = [[maps_of(ensemble, depth, x, y) for ensemble in ensembles] for depth in depths]
        rows.append([name, *(shown([distance(own) for own in runs]) for runs in by_depth)])
        for number in range(DRAWN):
            pictures = {
                f"{depth}": [images[number].numpy(), *(one.cpu().numpy() for one in own[0][:, number])]
                for depth, own in zip(depths, by_depth, strict=True)
            }
            titles = ["image", *(f"member {i}" for i in range(len(ensembles[0])))]
            figures.maps(pictures, titles, lab.out / f"maps-{name}-{number}.png")
    text = "1 − cosine between two members' maps of the true class, mean over pairs and test images, by layer:"
    drawn = "\n\n".join(f"{row[0]}:\n\n![maps](maps-{row[0]}-0.png)" for row in rows)
    return f"{text}\n\n{markdown_table(['method', *depths], rows)}\n\n{drawn}"


def depths_of(module: nn.Module) -> list[str]:
    """Names of layers that give maps [B, C, H, W], from the image to the head: every activation or stage."""
    if hasattr(module, "blocks"):
        return [f"blocks.{i}" for i in range(1, len(module.blocks), 2)]
    return [name for name, _ in module.named_modules() if name.startswith("relu")]


def maps_of(ensemble: Ensemble, layer: str, x: Tensor, y: Tensor) -> Tensor:
    """[M, B, H, W]: relu(sum_k w_k A_k), w_k the mean over the map of d logit / d A_k (Selvaraju et al. 2017)."""
    found = []
    with evaluation_mode(ensemble), torch.enable_grad():
        for member in ensemble.members:
            seen: list[Tensor] = []
            hook = member.get_submodule(layer).register_forward_hook(lambda *call, to=seen: to.append(call[-1]))
            try:
                logits = member(x)
            finally:
                hook.remove()
            (slope,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), seen[-1])
            found.append((slope.mean((2, 3), keepdim=True) * seen[-1]).sum(1).relu().detach())
    return torch.stack(found)


def distance(maps: Tensor) -> float:
    """1 - cosine between two members' maps [M, B, H, W], mean over pairs and images; a map of zeros has cosine 0."""
    unit = F.normalize(maps.flatten(2), dim=2)
    cosine = torch.einsum("ibd,jbd->ijb", unit, unit).mean(2)
    members = len(maps)
    return float(1 - (cosine.sum() - cosine.diagonal().sum()) / (members * (members - 1)))


# ---------------------------------------------------------------- toys


def _score(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs[:, 0]


REGRESSION = {
    "deep ensemble": METHODS["de"],
    "weight-RDE": Method(Weights(), normalize=False, bandwidth=WHOLE, weight=0.02),
    "function-RDE": Method(Outputs(), normalize=False, bandwidth=WHOLE, weight=per_sample),
    # of one input, gradients scaled to norm 1 would all be 1 or -1
    "FoRDE": Method(InputGradients(_score), normalize=False, weight=0.05),
}


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def _toy(method: Method, x: Tensor, y: Tensor, outputs: int, loss) -> Ensemble:
    ensemble = Ensemble(lambda: perceptron(x.shape[1], outputs), TOY_MEMBERS)
    trainer = Trainer(ensemble, method, optimizer=lambda p: torch.optim.Adam(p, 5e-3), loss=loss, strategy="stacked")
    for _ in range(TOY_STEPS):
        trainer.step(x, y)
    return ensemble


def regression(lab: Lab) -> str:
    """16 perceptrons (two hidden layers of 64 tanh, 600 steps of Adam at 0.005) on two stretches of a noisy sine:
    their mean and spread between and beyond them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.linspace(-1.6, -0.7, 20), torch.linspace(0.5, 1.4, 20)])[:, None]
    y = torch.sin(3 * x) + 0.05 * torch.randn(x.shape, generator=generator)
    grid = torch.linspace(-3, 3, 200)[:, None]
    panels, rows = {}, []
    for name, method in REGRESSION.items():
        ensemble = _toy(method, x, y, 1, F.mse_loss)
        with torch.no_grad():
            functions, fitted = ensemble(grid)[..., 0], ensemble(x)[..., 0]
        spread = functions.std(0)
        panels[name] = functions.numpy()
        between, beyond = (grid[:, 0].abs() < 0.4), (grid[:, 0].abs() > 2.2)
        error = float((fitted.mean(0) - y[:, 0]).square().mean().sqrt())
        cells = (float(fitted.std(0).mean()), float(spread[between].mean()), float(spread[beyond].mean()), error)
        rows.append([name, *(f"{cell:.3f}" for cell in cells)])
        lab.say(name)
    _draw_functions(grid[:, 0].numpy(), panels, x[:, 0].numpy(), y[:, 0].numpy(), lab.out / "regression.png")
    head = ["method", "spread at the data", "between", "beyond", "error of the mean at the data"]
    return f"{markdown_table(head, rows)}\n\n![functions](regression.png)"


def _draw_functions(grid: np.ndarray, panels: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, path) -> None:
    figure, axes = figures.grid_of(len(panels), 3.6, 2.8, 0)
    for own, (name, functions) in zip(axes, panels.items(), strict=False):
        mean, spread = functions.mean(0), functions.std(0)
        own.plot(grid, functions.T, color="#9db8d2", linewidth=0.6)
        own.fill_between(grid, mean - 2 * spread, mean + 2 * spread, alpha=0.15, color="C0", linewidth=0)
        own.plot(grid, mean, color="C0", linewidth=1.5)
        own.plot(x, y, ".", color="black", markersize=4)
        own.set(ylim=(-3.5, 3.5), xlabel="x")
        own.set_title(name, fontsize=10)
    figures.save(figure, path)


CLASSIFICATION = {
    **REGRESSION,
    "function-RDE": Method(Outputs("probabilities"), normalize=False, bandwidth=WHOLE, weight=per_sample),
    "FoRDE": Method(InputGradients()),
}


def classification(lab: Lab) -> str:
    """16 perceptrons (two hidden layers of 64 tanh, 600 steps of Adam at 0.005) on two half-moons: the entropy of
    their mean over the plane."""
    from sklearn.datasets import make_moons

    points, labels = make_moons(120, noise=0.08, random_state=0)
    x, y = torch.tensor(points, dtype=torch.float32), torch.from_numpy(labels)
    side = torch.linspace(-3, 4, 80)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).flatten(0, 1)
    far = torch.cdist(plane, x).amin(1) > 1.5
    panels, rows = {}, []
    for name, method in CLASSIFICATION.items():
        ensemble = _toy(method, x, y, 2, F.cross_entropy)
        found, near = ensemble.predict(plane), ensemble.predict(x)
        panels[name] = found.total.view(80, 80).numpy()
        right = float((near.mean.argmax(1) == y).float().mean())
        cells = (
            100 * right,
            float(near.total.mean()),
            float(found.total[far].mean()),
            float(found.epistemic[far].mean()),
        )
        rows.append([name, *(f"{cell:.3f}" for cell in cells)])
        lab.say(name)
    figure, axes = figures.grid_of(len(panels), 3.2, 2.9, 0)
    for own, (name, entropy) in zip(axes, panels.items(), strict=False):
        shade = own.pcolormesh(
            side.numpy(), side.numpy(), entropy, vmin=0, vmax=np.log(2), cmap="Blues", rasterized=True
        )
        own.scatter(*points.T, c=labels, s=6, cmap="coolwarm")
        own.set_title(name, fontsize=10)
    figure.colorbar(shade, ax=list(axes[: len(panels)]), label="entropy, nats", shrink=0.8)
    figures.save(figure, lab.out / "classification.png")
    head = ["method", "accuracy", "entropy at the data", "far away", "epistemic, far away"]
    return f"{markdown_table(head, rows)}\n\n![entropy](classification.png)"
