"""How uncertain an ensemble is of each sample, and of what kind that is."""

import torch
from torch import Tensor

from forde_fast.evaluation.checks import Array, as_probs


def uncertainty(member_probs: Array) -> dict[str, Tensor]:
    """Uncertainty of each sample in nats, as float64 tensors [B], of an ensemble's member_probs [M, B, K].

    total is the entropy of the members' mean, aleatoric the mean of the members' entropies, epistemic their
    difference: the mutual information of label and member, from 0 to log M (Depeweg et al. 2018). Errors as
    in `score`.
    """
    return decompose(as_probs(member_probs, "member_probs", "M, B, K").double())


def decompose(members: Tensor) -> dict[str, Tensor]:
    """`uncertainty` of probabilities [M, B, K] that need no check, in their dtype and on their device."""
    total = torch.special.entr(members.mean(0)).sum(1)
    aleatoric = torch.special.entr(members).sum(2).mean(0)
    # zero for members that agree, where the difference of two roundings may be negative
    return {"total": total, "aleatoric": aleatoric, "epistemic": (total - aleatoric).clamp(min=0)}
