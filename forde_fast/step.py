"""One step of FoRDE as pure functions: State, init, gradient, update.

A step moves every member i against the gradient, with respect to its parameters, of

    mean_b CE(f(x_b; theta_i), y_b) + (weight_decay / 2) |theta_i|^2 + repulsion_weight * R

(Trinh et al., ICLR 2024, equation 12). R's gradient with respect to the particles is fed back as their
cotangent, together with the loss's, in one vector-Jacobian product per member.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from forde_fast import validation
from forde_fast.diagnosis import cosine, of_distances
from forde_fast.ensemble import Ensemble
from forde_fast.methods import Method
from forde_fast.operators import UNUSABLE
from forde_fast.repulsion import check_backend, repulsion
from forde_fast.strategies import LOOP, Graphs, Strategy
from forde_fast.types import Repulsion
from forde_fast.validation import expect

# repelled steps between measurements of gradient_ratio, each of which costs a backward pass, and of two more
RATIO_EVERY = 10
MEASURED = ("gradient_ratio", "input_alignment", "input_variance")


class Log(NamedTuple):
    """What one step saw; tensors [] that are not waited for. Without repulsion all but the first are 0.

    cross_entropy      summed over the members (as R is), mean over the batch
    repulsion          R, before its weight
    bandwidth_median   mean over particles and samples of the median distance
    gradient_cosine    mean cosine between two members' particles: 1 where they agree, the quantity FoRDE lowers
    weight_entropy     mean entropy, in nats, of the kernel weights of a member; log(M B) where all are alike
    kernel_mean        mean of the kernel exp(-d / h) between two different members, from 0 to 1
    gradient_ratio     norm of the weighted repulsion's parameter gradient over that of the cross-entropy; 0 where
                       the latter is
    input_alignment    mean |cosine| between a member's input gradient and the input: 0 for a network that
                       normalises each input inside (scaling the input then changes nothing)
    input_variance     the batch's variance over that of the images on which the lengthscale was fitted
    dead_rows          particles whose squared norm is <= eps: their gradient is set to 0

    Those in MEASURED are as last measured, every RATIO_EVERY steps; the last two of them are 0 where there is
    nothing to measure (particles that are no input gradients, a lengthscale that was fitted on nothing).
    """

    cross_entropy: Tensor
    repulsion: Tensor
    bandwidth_median: Tensor
    gradient_cosine: Tensor
    weight_entropy: Tensor
    kernel_mean: Tensor
    gradient_ratio: Tensor
    input_alignment: Tensor
    input_variance: Tensor
    dead_rows: Tensor


@dataclass(frozen=True)
class State:
    """parameters, velocity: [M, P]; buffers: one dict of tensors per member; step: updates done."""

    parameters: Tensor
    velocity: Tensor
    buffers: tuple[dict[str, Tensor], ...]
    step: int


@dataclass(frozen=True)
class Objective:
    """What is descended: the loss, and the repulsion of a method with its lengthscale, weight, eps and backend.

    repulsion_every    k: the repulsion acts at every k-th step, with k times its weight
    repulsion_samples  n: on the batch's first n samples only, with n / B times its weight, so that R's 1 / B stays
    """

    method: Method
    lengthscale: object = None
    repulsion_weight: float = 1.0
    eps: float = 1e-24
    backend: str = "auto"
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    repulsion_every: int = 1
    repulsion_samples: int | None = None

    def __post_init__(self):
        expect(isinstance(self.method, Method), "method", "a Method", type(self.method).__name__, TypeError)
        validation.lengthscale(self.lengthscale)
        validation.positive(self.repulsion_weight, "repulsion_weight", allow_zero=True)
        validation.positive(self.eps, "eps")
        check_backend(self.backend)
        expect(callable(self.loss), "loss", "a callable (outputs, y) -> []", self.loss, TypeError)
        validation.whole(self.repulsion_every, "repulsion_every")
        if self.repulsion_samples is not None:
            validation.whole(self.repulsion_samples, "repulsion_samples")

    def repels(self, members: int) -> bool:
        return self.method.space is not None and members > 1 and self.repulsion_weight != 0

    def at(self, step: int) -> Objective:
        """What the step after `step` steps descends: the repulsion with k times its weight, or without it."""
        if self.repulsion_every == 1:
            return self
        due = step % self.repulsion_every == 0
        weight = self.repulsion_weight * self.repulsion_every if due else 0.0
        return replace(self, repulsion_weight=weight, repulsion_every=1)

    def measures(self, step: int) -> bool:
        """Whether what is in MEASURED is measured in this step."""
        return step % (self.repulsion_every * RATIO_EVERY) == 0


@dataclass(frozen=True)
class SGD:
    """v <- momentum v + g;  theta <- theta - lr (g + momentum v), or - lr v without Nesterov; g has weight decay."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4

    def __post_init__(self):
        validation.positive(self.lr, "lr")
        validation.positive(self.momentum, "momentum", allow_zero=True)
        expect(self.momentum < 1, "momentum", "a number below 1", self.momentum)
        validation.truth(self.nesterov, "nesterov")
        validation.positive(self.weight_decay, "weight_decay", allow_zero=True)


def init(ensemble: Ensemble) -> State:
    """The ensemble's parameters and buffers, copied, and a velocity of 0."""
    buffers = tuple({name: b.clone() for name, b in member.named_buffers()} for member in ensemble.members)
    return State(ensemble.flat.clone(), torch.zeros_like(ensemble.flat), buffers, 0)


def update(
    state: State,
    x: Tensor,
    y: Tensor,
    ensemble: Ensemble,
    objective: Objective,
    sgd: SGD,
    strategy: Strategy = LOOP,
) -> tuple[State, Log]:
    """One step: x [B, ...], y [B] -> the next State and what it saw. `state` and the ensemble stay as they are."""
    buffers = tuple({name: b.clone() for name, b in own.items()} for own in state.buffers)
    now, measured = objective.at(state.step), objective.measures(state.step)
    g, log = gradient(ensemble, state.parameters, buffers, x, y, now, measured, strategy)
    parameters, velocity = state.parameters.clone(), state.velocity.clone()
    descend_(parameters, velocity, g, sgd)
    return State(parameters, velocity, buffers, state.step + 1), log


def descend_(parameters: Tensor, velocity: Tensor, g: Tensor, sgd: SGD, rate: float | Tensor = 1.0) -> None:
    """SGD's update of parameters, velocity and g [M, P], in place; torch.optim.SGD's operations in its order, on the
    CPU in one pass over memory with the same bits, on CUDA its fused kernel.

    rate  factor of the learning rate: a tensor [] where a CUDA graph is to read it anew at every replay
    """
    lr = sgd.lr * rate
    plain = not isinstance(lr, Tensor) and all(t.is_contiguous() for t in (parameters, velocity, g))
    if plain and not UNUSABLE["cpp"] and parameters.device.type == "cpu" and parameters.dtype.itemsize >= 4:
        torch.ops.forde_fast.descend_(parameters, velocity, g, lr, sgd.momentum, sgd.weight_decay, sgd.nesterov)
        return
    if parameters.is_cuda and parameters.dtype == torch.float32 and sgd.momentum:
        torch._fused_sgd_(
            [parameters], [g], [velocity], weight_decay=sgd.weight_decay, momentum=sgd.momentum,
            lr=lr.float() if isinstance(lr, Tensor) else lr,
            dampening=0.0, nesterov=sgd.nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip
        return
    g.add_(parameters, alpha=sgd.weight_decay)
    velocity.mul_(sgd.momentum).add_(g)
    direction = g.add_(velocity, alpha=sgd.momentum) if sgd.nesterov else velocity
    if isinstance(lr, Tensor):
        parameters.addcmul_(direction, lr.to(parameters.dtype), value=-1)
    else:
        parameters.add_(direction, alpha=-lr)


class Alone:
    """What a step asks the ranks of a mesh, where there is but this process: all members and the whole batch are
    here, and every sum is complete. `forde_fast.distributed.Mesh` answers for several."""

    rank, ranks, column = 0, 1, 0
    own = slice(None)  # of the members

    def members(self, ensemble: Ensemble) -> int:
        """M, of which `ensemble` has those of this rank."""
        return len(ensemble)

    def prepare(self, ensemble: Ensemble, strategy: str) -> None:
        """Check what is to be trained, before any step."""

    def part(self, samples: int) -> slice:
        """Which of so many samples are this rank's."""
        return slice(samples)

    def weighted(self, loss: Callable, samples: int) -> Callable:
        """The loss of this rank's part, so that the parts add up to the mean over the batch."""
        return loss

    def repel(
        self, graphs: Graphs, objective: Objective, samples: int, of: int
    ) -> tuple[Tensor, Callable, dict[str, Tensor]]:
        """The space's values [M, G, D]; group of members -> their cotangents; what the log says of all ranks.

        samples, of  so many of the batch are repelled
        """
        losses, values = graphs.forward()
        objective = on_share(objective, graphs, values, samples, of)
        particles, result, cotangents, dead = _repel(values, objective, of)
        found = _diagnose(particles, result, dead, objective.method) | {"cross_entropy": losses.sum()}
        return values.detach(), cotangents.__getitem__, found

    def add(self, rows: Tensor) -> None:
        """Begin to add up a gradient, in place, over the parts of the batch; a sum counts once it is `added`."""

    def added(self) -> None:
        """Wait for all sums that were begun."""

    def average_shared_(self, ensemble: Ensemble, g: Tensor) -> None:
        """The gradients [M, P] of what all members have in common become their mean, in place."""
        ensemble.average_shared_(g)

    def total(self, sum: Tensor) -> Tensor:
        """A sum [...] over members and samples that are here -> over all."""
        return sum

    def norm(self, rows: Tensor) -> Tensor:
        """Of the gradients of all members, rows [M, P] being of those that are here."""
        return rows.norm()

    def mean(self, numbers: Tensor) -> Tensor:
        """Over all members and samples, numbers [M, B] being of those that are here."""
        return numbers.mean()

    def gather_members(self, rows: Tensor) -> Tensor:
        """rows [M, ...] of the members that are here -> of all."""
        return rows

    def agree(self, number: int) -> int:
        """What all ranks do next, if one of them gave a number other than 0."""
        return number

    def told(self, call: Callable[[], object]) -> object:
        """What `call` returns where the first rank runs."""
        return call()

    def leave(self) -> None:
        """The last call, for which all ranks wait."""


ALONE = Alone()


@torch.enable_grad()
def gradient(
    ensemble: Ensemble,
    parameters: Tensor,
    buffers: tuple[dict[str, Tensor], ...] | None,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    measure_ratio: bool = False,
    strategy: Strategy = LOOP,
    ranks: Alone = ALONE,
) -> tuple[Tensor, Log]:
    """The objective's gradient [M, P] without weight decay at `parameters` [M, P], and the step's Log.

    x, y      the whole batch, on every rank
    buffers   updated in place by the forward passes; None: the members' own
    strategy  how the members are computed; all strategies compute the same
    ranks     among which members and batch are split
    """
    log = dict.fromkeys(Log._fields, parameters.new_zeros(()))
    own = ranks.part(len(x))
    given = ensemble, parameters, buffers, x[own], y[own], ranks.weighted(objective.loss, len(x)), strategy
    if not objective.repels(ranks.members(ensemble)):
        g, losses = Graphs(*given).plain(ranks.add)
        ranks.added()
        ranks.average_shared_(ensemble, g)
        return g, Log(**log | {"cross_entropy": ranks.total(losses.sum())})
    n, apart = min(objective.repulsion_samples or len(x), len(x)), None
    if n < len(x):
        apart = x[ranks.part(n)], y[ranks.part(n)]
    graphs = Graphs(*given, objective.method.space, apart)
    values, cotangents, found = ranks.repel(graphs, objective, n, len(x))
    g, plain = graphs.pull_back(cotangents, measure_ratio, ranks.add)
    ranks.added()
    if measure_ratio:
        own = ranks.norm(plain)
        found["gradient_ratio"] = torch.where(own > 0, ranks.norm(g - plain) / own, 0)
        found |= _measure_inputs(x[:n], values, objective.lengthscale, ranks)
    ranks.average_shared_(ensemble, g)
    return g, Log(**log | found)


def on_share(objective: Objective, graphs: Graphs, values: Tensor, samples: int, of: int) -> Objective:
    """The objective on so many samples of a batch: with as much less weight where there is a particle per sample, in
    values [M, G, D] of those that are here, so that R's 1 / B stays."""
    if graphs.apart is None or values.shape[1] != len(graphs.apart[0]):
        return objective
    return replace(objective, repulsion_weight=objective.repulsion_weight * samples / of)


def _repel(values: Tensor, objective: Objective, batch: int) -> tuple[Tensor, Repulsion, Tensor, Tensor]:
    """The particles [M, G, D] of the space's values, their R, the values' cotangents, which rows [M, G] are dead.

    A particle with |J|^2 <= eps would get a gradient of order 1/sqrt(eps) from the normalisation.
    """
    method, own = objective.method, objective.method.weight_at(batch)
    together = getattr(method.space, "together", None)
    if together is not None or method.prior is not None:
        values.requires_grad_()
    particles = values if together is None else together(values)
    result = repulsion(
        particles.detach(),
        objective.lengthscale,
        normalize=method.normalize,
        eps=objective.eps,
        bandwidth=method.bandwidth,
        backend=objective.backend,
    )
    cotangents = result.gradient  # nobody else's: changed in place
    if objective.repulsion_weight * own != 1:
        cotangents.mul_(objective.repulsion_weight * own)
    dead = torch.linalg.vector_norm(particles.detach(), dim=-1).square() <= objective.eps
    if method.normalize and (dead.is_cuda or dead.any()):  # to ask a GPU would be to wait for it
        cotangents.masked_fill_(dead[..., None], 0)
    if values.requires_grad:
        reached, weights = [particles], [cotangents]
        if method.prior is not None:
            reached.append(method.prior(getattr(method.space, "known", lambda own: own)(values)) * own)
            weights.append(None)
        (cotangents,) = torch.autograd.grad(reached, values, weights)
    return particles.detach(), result, cotangents, dead


def _diagnose(particles: Tensor, result: Repulsion, dead: Tensor, method: Method) -> dict[str, Tensor]:
    """What the log says of particles [M, B, D]: two passes over them, the rest on [M, M, B]."""
    groups = particles.shape[1]
    found = of_distances(result.distances, result.bandwidth, method.bandwidth, groups)
    aligned = cosine(particles, torch.linalg.vector_norm(particles, dim=-1)) / groups
    return found | {"repulsion": result.value, "gradient_cosine": aligned, "dead_rows": dead.sum()}


def _measure_inputs(x: Tensor, particles: Tensor, lengthscale, ranks: Alone) -> dict[str, Tensor]:
    """Whether the input gradients, particles [M, B, D] of this rank's samples, and the lengthscale fit the inputs
    x [B, ...] of all."""
    rows, found = x.detach().flatten(1), {}
    own = rows[ranks.part(len(rows))]
    if particles.shape[1:] == own.shape:
        found["input_alignment"] = ranks.mean(F.cosine_similarity(particles, own, dim=-1).abs())
    variance = getattr(lengthscale, "variance", None)
    if variance and len(rows) > 1:
        found["input_variance"] = rows.var(0).sum() / variance
    return found
