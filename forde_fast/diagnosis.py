"""What a step's log says of distances and of particles: by one process of all, or by each rank of its share."""

from __future__ import annotations

import torch
from torch import Tensor

from forde_fast.rule import FLOOR, Median, median


def of_distances(
    d: Tensor, h: Tensor, bandwidth, groups: int, rows: Tensor | None = None, ranks: int = 1
) -> dict[str, Tensor]:
    """This rank's share in bandwidth_median, weight_entropy and kernel_mean of `step.Log`.

    d     [M, M, G] of its groups, of which there are `groups` in all, or of all
    h     of the same groups: [M, G], [M, 1] or []
    rows  the kernel's sums over all groups where d has some; None: d has all, and each of the ranks says the same
    """
    members, exact, h = len(d), d.double(), h.double()
    pairs, same = members * (members - 1), ranks if rows is None else 1
    first = getattr(bandwidth, "owner", "second") == "first"
    kernel = torch.exp(-exact / (h[:, None] if first else h))
    sums = kernel.sum((1, 2), keepdim=True) if rows is None else rows
    if bandwidth == "median" or bandwidth == Median():  # h is the median over a constant
        middle = (h - FLOOR).sum() * Median().log_count(members)
    else:
        middle = median(exact, (0,)).sum()
    return {
        "bandwidth_median": middle / (members * groups) / same,
        "weight_entropy": torch.special.entr(kernel / sums).sum() / members / same,
        "kernel_mean": kernel.sum() / (groups * pairs) / same - members / (pairs * ranks),
    }


def cosine(particles: Tensor, norms: Tensor, ranks: int = 1, norms_ranks: int = 1) -> Tensor:
    """Between two members' particles [M, G, D] of norms [M, G]: the mean over pairs, summed over groups.

    ranks, norms_ranks  how many ranks have the same particles and the same norms
    """
    scales = norms.clamp_min(1e-12).reciprocal()
    sums = torch.einsum("mg,mgd->gd", scales, particles)  # over the members, of what is scaled to norm 1
    aligned = sums.square().sum() / ranks - (norms * scales).square().sum() / norms_ranks
    return aligned / (len(particles) * (len(particles) - 1))
