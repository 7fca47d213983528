"""Small ensembles, and whether their members are views of one buffer."""

import torch
from torch import nn

import forde_fast as ff


def net(width=5):
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))


def make(members=3, seed=0, model=net):
    return ff.Ensemble(model, members, seed)


def parameters_of(member):
    return torch.cat([p.detach().flatten() for p in member.parameters() if p.requires_grad])


def are_views(ensemble):
    """Each member's parameters are its row of `flat`: in value, and when either side is changed."""
    rows = torch.stack([parameters_of(member) for member in ensemble.members])
    if not torch.equal(rows, ensemble.flat):
        return False
    kept = ensemble.flat.clone()
    with torch.no_grad():
        ensemble.flat.mul_(2).add_(1)
        forth = torch.stack([parameters_of(member) for member in ensemble.members])
        for number, member in enumerate(ensemble.members):
            for p in member.parameters():
                if p.requires_grad:
                    p.fill_(number)
        back = torch.arange(len(ensemble)).to(kept)[:, None].expand_as(kept)
        holds = torch.equal(forth, kept * 2 + 1) and torch.equal(ensemble.flat, back)
        ensemble.flat.copy_(kept)
    return holds
