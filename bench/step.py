"""The training step: ours against a plain PyTorch loop that differentiates twice with autograd, and against a plain
deep-ensemble step, whose cost times 2 is the floor of exact FoRDE.

    python bench/step.py [--device cuda] [--rounds 9] [--out FOLDER]
"""

import sys

import torch
from timing import append, interleaved, options, quantiles, ratio
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import models, reference

CASES = [  # model, width, members, batch, input
    ("mlp", 128, 5, 128, (1, 28, 28)),
    ("mlp", 128, 10, 128, (1, 28, 28)),
    ("cnn", 16, 5, 128, (1, 28, 28)),
    ("resnet18", 16, 2, 64, (3, 32, 32)),
]


def plain_step(members, optimizer, x, y, repulsive):
    """The published objective in plain PyTorch: one graph through all members, differentiated twice."""
    x = x.detach().requires_grad_(repulsive)
    outputs = [member(x) for member in members]
    loss = sum(F.cross_entropy(o, y) for o in outputs)
    if repulsive:
        scores = [o.gather(1, y[:, None]).sum() for o in outputs]
        gradients = torch.stack([torch.autograd.grad(s, x, create_graph=True)[0].flatten(1) for s in scores])
        s = reference.normalise(gradients, 1e-24)
        d = reference.squared_distances(s, s.detach())
        loss = loss + reference.value(d, reference.bandwidth_of(d.detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(model, width, members, batch, shape, device, rounds):
    def build():
        return models.make(model, 10, shape, width)

    x, y = torch.randn(batch, *shape, device=device), torch.randint(10, (batch,), device=device)
    plain = [m.train() for m in ff.Ensemble(build, members).to(device).members]
    optimizer = torch.optim.SGD([p for m in plain for p in m.parameters()], 0.01, 0.9, nesterov=True)
    trainers = {name: ff.Trainer(ff.Ensemble(build, members).to(device), name, lr=0.01) for name in ("de", "forde")}
    times = interleaved(
        {
            "plain de": lambda: plain_step(plain, optimizer, x, y, False),
            "de": lambda: trainers["de"].step(x, y),
            "plain forde": lambda: plain_step(plain, optimizer, x, y, True),
            "forde": lambda: trainers["forde"].step(x, y),
        },
        rounds,
        device,
    )
    return [
        {
            "provider": name, "model": model, "width": width, "M": members, "B": batch,
            **dict(zip(("ms_20", "ms", "ms_80"), (round(1e3 * t, 3) for t in quantiles(times[name])), strict=True)),
            "over_plain_de": round(ratio(times[name], times["plain de"]), 3),
        }
        for name in times
    ]  # fmt: skip


def main() -> int:
    given = options(__doc__, rounds=9)
    table = []
    for case in CASES:
        for row in measure(*case, given.device, given.rounds):
            table.append(row)
            print("{provider:12} {model:9} width {width:3} M {M:3} B {B:4} {ms:10.2f} ms   "
                  "{over_plain_de:6.2f} x a plain deep-ensemble step".format(**row), flush=True)  # fmt: skip
    print(append("step", table, given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
