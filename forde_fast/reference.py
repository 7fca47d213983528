"""The oracle: what every number must be, one short function per equation, differentiated by autograd.

No backend imports this module and it imports no backend. It works in the dtype it is given (bfloat16 is upcast
to float32) and holds [Mi, Mj, G, D]: slow and clear. Source: Trinh et al., ICLR 2024 (arXiv 2306.02775), with
the published code's choices: the bandwidth belongs to the second particle and the sample, the median counts
self-distances, eps stands under the root.
"""

import math

import torch
from torch import Tensor

from forde_fast.types import Repulsion


def normalise(particles: Tensor, eps: float) -> Tensor:
    """s = J / sqrt(|J|^2 + eps), over the last dimension."""
    return particles / torch.sqrt(particles.square().sum(-1, keepdim=True) + eps)


def squared_distances(s: Tensor, others: Tensor, lengthscale=None) -> Tensor:
    """d_ij = (s_i - s_j)^T C (s_i - s_j): s [Mi, G, D], others [Mj, G, D] -> [Mi, Mj, G].

    `lengthscale.coordinates` maps s to x with |x_i - x_j|^2 = d_ij; None is the identity.
    """
    x = s if lengthscale is None else lengthscale.coordinates(s)
    y = others if lengthscale is None else lengthscale.coordinates(others)
    return (x[:, None] - y[None, :]).square().sum(-1)


def bandwidth_of(d: Tensor, bandwidth="median") -> Tensor:
    """h_jg = median_i d_ijg / log M + 1e-12 (the default), one of its variants, or the given values."""
    if not isinstance(bandwidth, str) and not hasattr(bandwidth, "owner"):
        return torch.as_tensor(bandwidth, dtype=d.dtype, device=d.device)[None].expand_as(d)
    over, owner = getattr(bandwidth, "over", "particle"), getattr(bandwidth, "owner", "second")
    if over == "particle":
        middle = torch.quantile(d, 0.5, dim=0 if owner == "second" else 1, keepdim=True)
    elif over == "sample":
        middle = torch.quantile(d.flatten(0, 1), 0.5, dim=0)
    else:
        middle = torch.quantile(d.flatten(), 0.5)
    if getattr(bandwidth, "squared", False):
        middle = middle.square()
    count = d.shape[1] + 1 if getattr(bandwidth, "add_one", False) else max(d.shape[1], 2)
    return (middle / math.log(count) + 1e-12).expand_as(d)


def value(d: Tensor, h: Tensor) -> Tensor:
    """R = (1/G) sum_i [log sum_j sum_g exp(-d_ijg / h_ijg) - log G]: d, h [Mi, Mj, G] -> []."""
    groups = d.shape[2]
    return (torch.logsumexp((-d / h).flatten(1), dim=1) - math.log(groups)).sum() / groups


def weights(d: Tensor, h: Tensor) -> Tensor:
    """p_ijg = exp(-d_ijg / h_ijg) / sum_jg exp(-d_ijg / h_ijg): [Mi, Mj, G]."""
    return torch.softmax((-d / h).flatten(1), dim=1).view_as(d)


def distances(particles: Tensor, lengthscale=None, others=None, normalize=True, eps=1e-24):
    """d [Mi, Mj, G], and the state from which `combine` takes the gradient: d's graph back to the particles."""
    wide = particles.detach().float() if particles.dtype == torch.bfloat16 else particles.detach()
    wide = wide.clone().requires_grad_()
    fixed = (particles if others is None else others).detach().to(wide.dtype)
    with torch.enable_grad():
        s = normalise(wide, eps) if normalize else wide
        d = squared_distances(s, normalise(fixed, eps) if normalize else fixed, lengthscale)
    return d.detach(), (d, wide, particles.dtype)


def combine(state, c: Tensor) -> Tensor:
    """sum_jg (c_ijg / 2) dd_ijg/dJ_i: c / 2 is dR/dd."""
    d, particles, dtype = state
    return torch.autograd.grad(d, particles, c / 2, retain_graph=True)[0].to(dtype)


def repulsion(particles, lengthscale=None, others=None, normalize=True, eps=1e-24, bandwidth="median") -> Repulsion:
    """R and dR/dparticles with `others` and the bandwidth held constant, as `forde_fast.repulsion` defines them."""
    d, state = distances(particles, lengthscale, others, normalize, eps)
    graph, wide, dtype = state
    if hasattr(bandwidth, "apply"):  # a rule of its own
        r, c, h = (result.to(d.dtype) for result in bandwidth.apply(d.double()))
        return Repulsion(r, combine(state, c), h, d)
    h = bandwidth_of(d, bandwidth)
    with torch.enable_grad():
        r = value(graph, h)
    gradient = torch.autograd.grad(r, wide)[0].to(dtype)
    owned = h[:, 0] if getattr(bandwidth, "owner", "second") == "first" else h[0]
    return Repulsion(r.detach(), gradient, owned, d)
