"""The small types that the public functions return."""

from typing import NamedTuple

from torch import Tensor


class Repulsion(NamedTuple):
    """What `repulsion` returns: M moving particles, N particles that repel them (M by default), G groups.

    value      []         R, differentiable once with respect to the particles
    gradient   [M, G, D]  dR/dparticles with `others` and the bandwidth held constant, in the particles' dtype
    bandwidth  [N, G]     h of the kernel exp(-d / h); [M, G] where the first particle owns it
    distances  [M, N, G]  d, squared distances under the lengthscale
    """

    value: Tensor
    gradient: Tensor
    bandwidth: Tensor
    distances: Tensor


class Backend(NamedTuple):
    """One implementation of the operation: true where it is usable here, else `reason` says why not."""

    name: str
    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable

    def __str__(self) -> str:
        return "usable" if self.usable else self.reason


class Prediction(NamedTuple):
    """What `Ensemble.predict` returns, for B samples and K classes.

    mean       [B, K]     mean of the members' probabilities: the ensemble's prediction
    members    [M, B, K]  each member's probabilities
    total      [B]        entropy of the mean, in nats
    aleatoric  [B]        mean of the members' entropies: what more members would not take away
    epistemic  [B]        their difference, the mutual information of label and member: how much members disagree
    """

    mean: Tensor
    members: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
