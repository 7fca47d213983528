"""Where the members meet: the repulsion of a step, computed by all ranks together.

What members are compared by is cut into shares, one for each rank, and a rank is sent all members' values of its
share, finds distances, coefficients and gradient there with the operation that one process has, and sends the
gradients back. To gather all members everywhere would take more bytes from three ranks on, and every rank would
compute all distances.

InputGradients are cut by samples: a sample's distances need all members and no other sample, and the kernel's weights
no more of another sample than M sums. Spaces with one particle for the whole batch or network are cut by columns,
over which distances add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forde_fast.diagnosis import cosine, of_distances
from forde_fast.distributed.exchange import Exchange
from forde_fast.distributed.parts import cut
from forde_fast.lengthscales import Identity
from forde_fast.precision import matmul
from forde_fast.repulsion import combine, distances
from forde_fast.rule import Rule, kernel_rule
from forde_fast.step import Objective, on_share
from forde_fast.strategies import Graphs
from forde_fast.validation import expect


def meet(mesh, graphs: Graphs, objective: Objective, samples: int, of: int):
    """`Alone.repel` of a mesh; all ranks call it together."""
    split = getattr(objective.method.space, "split", "samples")
    meeting = BySamples(mesh, objective) if split == "samples" else ByColumns(mesh, objective, split)

    def send(values: Tensor) -> None:
        for own in values:
            meeting.send(own)

    losses, values = graphs.forward(send)
    meeting.objective = on_share(objective, graphs, values, samples, of)
    meeting.weight = objective.method.weight_at(of)
    found = meeting.repel(values, samples) | {"cross_entropy": losses.sum()}
    sums = mesh.total(torch.stack([part.double() for part in found.values()]))
    return values, meeting.cotangents, dict(zip(found, sums.to(losses.dtype), strict=True))


class BySamples:
    """Values [M, G, D] with a group for each of this rank's samples.

    With C = F F^T, F [D, K], the coordinates s F of the normalised particles are all that the others need: K numbers
    in place of D both ways, taken back through F and the normalisation by the member's own rank. What the log says of
    particles is then said of their coordinates.
    """

    def __init__(self, mesh, objective: Objective):
        self.mesh, self.objective, self.exchange = mesh, objective, Exchange(mesh)
        self.normalize, self.factor = objective.method.normalize, None

    def send(self, particles: Tensor) -> None:
        if not self.exchange.inbox and self.mesh.rows > 1 and hasattr(self.objective.lengthscale, "factors"):
            factors = self.objective.lengthscale.factors(particles.dtype, particles.device)
            self.factor = factors[0] if factors is not None and factors[1] == 0 else None
        if self.factor is not None:
            particles = matmul(self._normalised(particles)[0], self.factor, "ieee")
        self.exchange.send(particles)

    def repel(self, values: Tensor, samples: int) -> dict[str, Tensor]:
        """This rank's share in what the log says of all."""
        own, everyone = self.objective, self.exchange.received()
        members, here, _ = everyone.shape
        if here:
            lengthscale = own.lengthscale if self.factor is None else None
            normalize = self.normalize and self.factor is None
            options = {"normalize": normalize, "eps": own.eps, "backend": own.backend}
            d, state = distances(everyone, lengthscale, **options)
        else:
            d = everyone.new_empty(members, members, 0)
        value, c, found = self._rule(d, samples)
        gradient = combine(state, c) if here else torch.zeros_like(everyone)
        self.exchange.send_back(gradient.mul_(own.repulsion_weight * self.weight))
        self.particles = values
        self.dead = torch.linalg.vector_norm(values, dim=-1).square() <= own.eps
        found["gradient_cosine"] = cosine(everyone, torch.linalg.vector_norm(everyone, dim=-1)) / samples
        return found | {"repulsion": value / self.mesh.ranks, "dead_rows": self.dead.sum()}

    def _rule(self, d: Tensor, samples: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Value of all samples, coefficients of those that are here, and this rank's share in the log."""
        bandwidth = self.objective.method.bandwidth
        if isinstance(bandwidth, Rule) or getattr(bandwidth, "over", None) == "batch":  # they need all distances
            d, here = self.mesh.gather_groups(d)
            value, c, h = kernel_rule(d, bandwidth)
            return value, c[..., here], of_distances(d, h, bandwidth, samples, None, self.mesh.ranks)
        rows = []

        def reduce(sums: Tensor) -> Tensor:
            rows.append(self.mesh.total(sums))
            return rows[0]

        value, c, h = kernel_rule(d, bandwidth, samples, reduce)
        return value, c, of_distances(d, h, bandwidth, samples, rows[0], self.mesh.ranks)

    def cotangents(self, group: slice) -> Tensor:
        return torch.stack([self._cotangent(k) for k in range(group.start, group.stop)])

    def _cotangent(self, member: int) -> Tensor:
        g, particles = self.exchange.sent_back(member), self.particles[member]
        if self.factor is not None:
            g = matmul(g, self.factor.T, "ieee")
            if self.normalize:
                s, norm = self._normalised(particles)
                g = (g - (g * s).sum(-1, keepdim=True) * s) / norm
        if self.normalize:
            g = g.masked_fill(self.dead[member, :, None], 0)
        prior = _prior_gradient(self.objective.method, particles[None])
        return g if prior is None else g.add_(prior[0], alpha=self.weight)

    def _normalised(self, particles: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.normalize:
            return particles, None
        norm = (particles.square().sum(-1, keepdim=True) + self.objective.eps).sqrt()
        return particles / norm, norm


class ByColumns:
    """Values [M, G, D] of which each data part has other columns ("columns": they are of its samples) or the same
    ones ("nothing": they are of the members alone, and each data part takes care of some).

    Distances, and what a space's `together` makes of the values, are then small and the same on every rank.
    """

    def __init__(self, mesh, objective: Objective, split: str):
        method, lengthscale = objective.method, objective.lengthscale
        self.together = getattr(method.space, "together", None)
        plain = self.together is not None or lengthscale is None or isinstance(lengthscale, Identity)
        whole = "one without normalisation and lengthscale, as its particles are cut by columns"
        expect(plain and not method.normalize, "method", whole, method)
        self.mesh, self.objective, self.split, self.exchange = mesh, objective, split, Exchange(mesh)

    def send(self, values: Tensor) -> None:
        if self.split == "nothing":
            self.columns = cut(values.shape[1], self.mesh.parts)[self.mesh.column]
            values = values[:, self.columns]
        self.exchange.send(values.T)

    def repel(self, values: Tensor, samples: int) -> dict[str, Tensor]:
        """This rank's share in what the log says of all."""
        self.width, own, ranks = values.shape[2], self.objective, self.mesh.ranks
        here = self.exchange.received().mT.contiguous()
        if self.together is None:
            particles = here
        else:
            here.requires_grad_()
            particles = self.together(here, lambda sum: _Total.apply(sum, self.mesh))
        fixed = particles.detach()
        lengthscale = None if self.together is None else own.lengthscale
        d, state = distances(fixed, lengthscale, normalize=False, eps=own.eps, backend=own.backend)
        norms = torch.linalg.vector_norm(fixed, dim=-1)
        if self.together is None:
            d, norms = self.mesh.total(d), self.mesh.total(norms.double().square()).sqrt().to(norms.dtype)
        value, c, h = kernel_rule(d, own.method.bandwidth)
        gradient = combine(state, c).mul_(own.repulsion_weight * self.weight)
        if self.together is not None:
            (gradient,) = torch.autograd.grad(particles, here, gradient)
        prior = _prior_gradient(own.method, here)
        self.exchange.send_back((gradient if prior is None else gradient.add_(prior, alpha=self.weight)).mT)
        groups = d.shape[2]
        found = of_distances(d, h, own.method.bandwidth, groups, None, ranks)
        aligned = cosine(fixed, norms, *((1, ranks) if self.together is None else (ranks, ranks))) / groups
        dead = (norms.square() <= own.eps).sum() / ranks
        return found | {"gradient_cosine": aligned, "repulsion": value / ranks, "dead_rows": dead}

    def cotangents(self, group: slice) -> Tensor:
        return torch.stack([self._cotangent(k) for k in range(group.start, group.stop)])

    def _cotangent(self, member: int) -> Tensor:
        g = self.exchange.sent_back(member).T
        if self.split != "nothing":
            return g
        whole = g.new_zeros(len(g), self.width)  # the other data parts have the rest
        whole[:, self.columns] = g
        return whole


class _Total(torch.autograd.Function):
    """A sum over ranks, each of which goes on with the same: the gradient of a rank's own addend is the sum's."""

    @staticmethod
    def forward(ctx, sum: Tensor, mesh) -> Tensor:
        return mesh.total(sum)

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None


def _prior_gradient(method, values: Tensor) -> Tensor | None:
    """Of a method's prior, a sum over the values [n, G, D]."""
    if method.prior is None:
        return None
    values = values.detach().requires_grad_()
    penalty = method.prior(getattr(method.space, "known", lambda own: own)(values))
    return torch.autograd.grad(penalty, values)[0]
