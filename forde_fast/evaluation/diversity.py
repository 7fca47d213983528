"""How much the members differ: in what they predict, and in their input gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from forde_fast.evaluation.checks import Array, as_numbers, as_probs
from forde_fast.modes import evaluation_mode
from forde_fast.validation import expect, labels_in_range, whole


def disagreement(member_probs: Array) -> float:
    """The share of samples on which two members predict different classes, mean over all pairs of members.

    member_probs [M, B, K]; 0 for a single member. Errors as in `score`.
    """
    return pair_disagreement(as_probs(member_probs, "member_probs", "M, B, K")).mean().item()


def pair_disagreement(members: Tensor) -> Tensor:
    """The share of pairs of members that disagree on each sample: [M, B, K], unchecked -> float64 [B]."""
    count, _, classes = members.shape
    votes = torch.nn.functional.one_hot(members.argmax(2), classes).sum(0).double()  # [B, K]
    agreeing = (votes * (votes - 1)).sum(1)
    return 1 - agreeing / (count * (count - 1)) if count > 1 else torch.zeros_like(agreeing)


def input_gradients(ensemble, x: Tensor, y: Tensor, score: str = "logit", batch_size: int = 256) -> Tensor:
    """J [M, B, D], each member's gradient of its score with respect to its input, in evaluation mode.

    x [B, ...], y [B] on the ensemble's device; score "logit" (of the true class) or "log_probability" or a
    callable, as `spaces.InputGradients` has it. The result lies on the same device. Raises TypeError or ValueError
    for what is no such batch; for a callable, y may be anything of which each sample has one.
    """
    from forde_fast.spaces import InputGradients

    space, parts = InputGradients(score), []
    _check_batch(ensemble, x, y)
    whole(batch_size, "batch_size")
    with evaluation_mode(ensemble), torch.inference_mode(False), torch.enable_grad():
        # what was made under torch.inference_mode may be in no graph
        x, y = (given.clone() if given.is_inference() else given for given in (x, y))
        if not callable(score):
            labels_in_range(y, ensemble(x[:1]).shape[-1], "y")
            y = y.long()
        for own_x, own_y in zip(x.split(batch_size), y.split(batch_size), strict=True):
            parts.append(torch.stack([space(member, own_x, own_y)[1].detach() for member in ensemble.members]))
    return torch.cat(parts, dim=1)


def _check_batch(ensemble, x: Tensor, y: Tensor) -> None:
    from forde_fast.ensemble import Ensemble

    expect(isinstance(ensemble, Ensemble), "ensemble", "an Ensemble", type(ensemble).__name__, TypeError)
    flat = ensemble.flat
    expect(isinstance(x, Tensor), "x", "a torch.Tensor", type(x).__name__, TypeError)
    expect(x.dtype == flat.dtype, "x", f"dtype {flat.dtype}, as the members", x.dtype, TypeError)
    expect(x.device == flat.device, "x", f"device {flat.device}, as the members", x.device)
    batch = x.ndim > 1 and x.numel() > 0
    expect(batch, "x", "at least 2 dimensions [B, ...], none of size 0", f"shape {list(x.shape)}")
    expect(isinstance(y, Tensor), "y", "a torch.Tensor", type(y).__name__, TypeError)
    expect(y.shape[:1] == x.shape[:1], "y", f"one label per sample, {len(x)}", f"shape {list(y.shape)}")
    expect(y.device == x.device, "y", f"device {x.device}, as x", y.device)


def gradient_cosine(gradients: Array) -> float:
    """The cosine between two members' gradients [M, B, D] of a sample, mean over pairs of members and samples.

    1 minus it is the cosine distance of the paper's figures. A gradient of 0 has cosine 0 with all others; a
    single member gives 1. Raises TypeError and ValueError for what is no such tensor of finite numbers.
    """
    j = as_numbers(gradients, "gradients", "M, B, D")
    members, samples, _ = j.shape
    if members == 1:
        return 1.0
    largest = j.abs().amax(2, keepdim=True)
    j = j / largest.where(largest > 0, 1)  # whose squares neither vanish nor overflow
    s = torch.nn.functional.normalize(j, dim=2)
    together = s.sum(0).square().sum() - s.square().sum()  # of all ordered pairs, without building them
    return (together / (members * (members - 1) * samples)).item()


def kernel_similarity(gradients: Array, lengthscale=None, bandwidth="median") -> float:
    """FoRDE's kernel exp(-d / h) between two different members, mean over pairs and samples: from 0 to 1.

    gradients [M, B, D], lengthscale and bandwidth as `forde_fast.repulsion` takes them. A bandwidth by the median
    adapts to the members: to compare ensembles give them all the same number. A single member gives 1.
    """
    from forde_fast.repulsion import distances
    from forde_fast.rule import Rule, bandwidth_of, check_bandwidth

    j = as_numbers(gradients, "gradients", "M, B, D")
    bandwidth = bandwidth.cpu() if isinstance(bandwidth, Tensor) else bandwidth  # to where j is
    check_bandwidth(bandwidth, j)
    has_one = not isinstance(bandwidth, Rule)
    expect(has_one, "bandwidth", "'median', a Median, a number or a tensor", type(bandwidth).__name__, TypeError)
    members = len(j)
    if members == 1:
        return 1.0
    d = distances(j, lengthscale)[0].double()  # [M, M, B]
    kernel = torch.exp(-d / bandwidth_of(d, bandwidth))
    own = kernel.diagonal(dim1=0, dim2=1).sum()
    return ((kernel.sum() - own) / (members * (members - 1) * j.shape[1])).item()
