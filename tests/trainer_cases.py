"""What the trainer's tests share: networks, batches, the published run, and the step's gradient by its definition."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import reference

F32, F64 = torch.float32, torch.float64
GOLDEN = np.load(Path(__file__).parent / "golden" / "trajectory.npz")


def relative(x, exact):
    return float((x - exact).norm() / exact.norm())


def net(dropout=0.0, width=8):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, 4),
    )  # fmt: skip


def batch(size=6, dtype=F32):
    return torch.randn(size, 3, 2, 2, dtype=dtype), torch.randint(4, (size,))


def batches(count, size=6):
    return [batch(size) for _ in range(count)]


def state_of(ensemble):
    return {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}


def same_state(ensemble, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())


class Published(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=eps)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12, eps=eps)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def golden(what):
    return torch.from_numpy(GOLDEN[what])


def published_parameters(which):
    """{name in PyTorch: [M, ...]} of 'start', 'grad0' or 'end'."""
    names = [name for name, _ in Published(1e-5).named_parameters()]
    stored = [n.removesuffix(".weight") if "conv" in n else n.replace(".", "_") for n in names]
    return {name: golden(f"{which}_{key}") for name, key in zip(names, stored, strict=True)}


def published_trainer(backend):
    if not ff.available_backends()[backend]:
        pytest.skip(f"waits for the {backend} backend")
    members = [Published(float(golden("bn_eps"))).double() for _ in range(4)]
    for i, member in enumerate(members):
        member.load_state_dict({n: p[i] for n, p in published_parameters("start").items()}, strict=False)
    return ff.Trainer(
        ff.Ensemble.from_modules(members),
        lengthscale=ff.PCA(golden("eigenvectors"), golden("eigenvalues")),
        eps=float(golden("eps")),
        backend=backend,
        lr=float(golden("lr")),
        momentum=float(golden("momentum")),
        weight_decay=float(golden("weight_decay")),
    )


def assert_members_have(ensemble, rows, which, tolerance):
    """rows [M, P], as the published run's parameters."""
    for i, row in enumerate(rows):
        named = list(ensemble.member(i).named_parameters())
        pieces = row.split([p.numel() for _, p in named])
        for (name, p), piece in zip(named, pieces, strict=True):
            exact = published_parameters(which)[name][i]
            assert relative(piece.view(p.shape), exact) < tolerance, (i, name)


def plain_loop(models, data, rates=None, **sgd):
    """M ordinary training loops."""
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} | sgd
    optimizers = [torch.optim.SGD(model.parameters(), **sgd) for model in models]
    for (x, y), rate in zip(data, rates or itertools.repeat(1.0), strict=rates is not None):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = sgd["lr"] * rate
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return models


def assert_same_networks(ensemble, models):
    for member, model in zip(ensemble.members, models, strict=True):
        for (name, one), other in zip(member.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


SCORES = {
    "logit": lambda o, y: o.gather(1, y[:, None])[:, 0],
    "log_probability": lambda o, y: -F.cross_entropy(o, y, reduction="none"),
}


def by_autograd(ensemble, x, y, weight=1.0, scale=None, score="logit", bandwidth="median"):
    """The gradient of sum_i CE_i + w R by its definition, with s_j and h constants in it; J and d."""
    x = x.detach().requires_grad_()
    losses, rows = [], []
    for member in ensemble.members:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = member(x)
        losses.append(F.cross_entropy(outputs, y))
        rows.append(torch.autograd.grad(SCORES[score](outputs, y).sum(), x, create_graph=True)[0].flatten(1))
    rows = torch.stack(rows)
    s = reference.normalise(rows, 1e-24)
    d = reference.squared_distances(s, s.detach(), scale)
    value = reference.value(d, reference.bandwidth_of(d.detach(), bandwidth))
    total = torch.stack(losses).sum() + weight * value
    parameters = [p for p in ensemble.parameters() if p.requires_grad]
    g = torch.cat([part.flatten() for part in torch.autograd.grad(total, parameters)])
    return g.view_as(ensemble.flat), rows.detach(), d.detach()


def mean_cosine(rows):
    """Over pairs of members and over samples, of J [M, B, D]."""
    pairs = list(itertools.combinations(rows, 2))
    return sum(float(F.cosine_similarity(a, b, dim=1).mean()) for a, b in pairs) / len(pairs)
