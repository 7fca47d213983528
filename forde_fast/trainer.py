"""FoRDE as an algorithm: State, init, gradient, update, pure functions; and Trainer, the loop around them.

One step moves every member i against the gradient, with respect to its parameters, of

    mean_b CE(f(x_b; theta_i), y_b) + (weight_decay / 2) |theta_i|^2 + repulsion_weight * R

(Trinh et al., ICLR 2024, equation 12). R's gradient with respect to the particles is fed back as their
cotangent, together with the loss's, in one vector-Jacobian product per member.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forde_fast import second_order, validation
from forde_fast.ensemble import Ensemble, evaluation_mode
from forde_fast.methods import Method, resolve
from forde_fast.repulsion import check_backend, repulsion
from forde_fast.rule import kernel_weights, median
from forde_fast.spaces import InputGradients
from forde_fast.types import Repulsion
from forde_fast.validation import expect

RATIO_EVERY = 10  # steps between measurements of gradient_ratio, each of which costs a backward pass, and of two more
MEASURED = ("gradient_ratio", "input_alignment", "input_variance")


class Log(NamedTuple):
    """What one step saw; tensors [] that are not waited for. Without repulsion all but the first are 0.

    cross_entropy      summed over the members (as R is), mean over the batch
    repulsion          R, before its weight
    bandwidth_median   mean over particles and samples of the median distance
    gradient_cosine    mean cosine between two members' particles: 1 where they agree, the quantity FoRDE lowers
    weight_entropy     mean entropy, in nats, of the kernel weights of a member; log(M B) where all are alike
    kernel_mean        mean of the kernel exp(-d / h) between two different members, from 0 to 1
    gradient_ratio     norm of the weighted repulsion's parameter gradient over that of the cross-entropy
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
    """What is descended: the loss, and the repulsion of a method with its lengthscale, weight, eps and backend."""

    method: Method
    lengthscale: object = None
    repulsion_weight: float = 1.0
    eps: float = 1e-24
    backend: str = "auto"
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def repels(self, members: int) -> bool:
        return self.method.space is not None and members > 1 and self.repulsion_weight != 0


@dataclass(frozen=True)
class SGD:
    """v <- momentum v + g;  theta <- theta - lr (g + momentum v), or - lr v without Nesterov; g has weight decay."""

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4


def init(ensemble: Ensemble) -> State:
    """The ensemble's parameters and buffers, copied, and a velocity of 0."""
    buffers = tuple({name: b.clone() for name, b in member.named_buffers()} for member in ensemble.members)
    return State(ensemble.flat.clone(), torch.zeros_like(ensemble.flat), buffers, 0)


def update(
    state: State, x: Tensor, y: Tensor, ensemble: Ensemble, objective: Objective, sgd: SGD
) -> tuple[State, Log]:
    """One step: x [B, ...], y [B] -> the next State and what it saw. `state` and the ensemble stay as they are."""
    buffers = tuple({name: b.clone() for name, b in own.items()} for own in state.buffers)
    g, log = gradient(
        ensemble, state.parameters, buffers, x, y, objective, measure_ratio=state.step % RATIO_EVERY == 0
    )
    parameters, velocity = state.parameters.clone(), state.velocity.clone()
    descend_(parameters, velocity, g, sgd)
    return State(parameters, velocity, buffers, state.step + 1), log


def descend_(parameters: Tensor, velocity: Tensor, g: Tensor, sgd: SGD) -> None:
    """SGD's update of parameters, velocity and g [M, P], in place; torch.optim.SGD's operations in its order."""
    g.add_(parameters, alpha=sgd.weight_decay)
    velocity.mul_(sgd.momentum).add_(g)
    parameters.add_(g.add_(velocity, alpha=sgd.momentum) if sgd.nesterov else velocity, alpha=-sgd.lr)


@torch.enable_grad()
def gradient(
    ensemble: Ensemble,
    parameters: Tensor,
    buffers: tuple[dict[str, Tensor], ...] | None,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    measure_ratio: bool = False,
) -> tuple[Tensor, Log]:
    """The objective's gradient [M, P] without weight decay at `parameters` [M, P], and the step's Log.

    buffers  updated in place by the forward passes; None: the members' own
    """
    repels = objective.repels(len(ensemble))
    thetas, losses, particles = [], [], []
    for i in range(len(ensemble)):
        theta = parameters[i].detach().requires_grad_()
        forward = ensemble.functional(i, theta, buffers[i] if buffers else None)
        outputs, own = objective.method.space(forward, x, y) if repels else (forward(x), None)
        thetas.append(theta)
        losses.append(objective.loss(outputs, y))
        particles.append(own)
    log = dict.fromkeys(Log._fields, parameters.new_zeros(()))
    log["cross_entropy"] = torch.stack([loss.detach() for loss in losses]).sum()
    cotangents = [None] * len(ensemble)
    if repels:
        together = torch.stack([own.detach() for own in particles])
        result, cotangents, dead = _repel(together, objective)
        log |= _diagnose(together, result, dead, objective.method)
    g = torch.empty_like(parameters)
    plain = torch.empty_like(parameters) if repels and measure_ratio else None
    for i, theta in enumerate(thetas):
        if plain is not None:
            plain[i] = torch.autograd.grad(losses[i], theta, retain_graph=True)[0]
        pair = ((losses[i], particles[i]), (None, cotangents[i])) if repels else (losses[i], None)
        g[i] = torch.autograd.grad(pair[0], theta, pair[1])[0]
        losses[i] = particles[i] = None  # this member's graph is freed
    if plain is not None:
        log["gradient_ratio"] = (g - plain).norm() / plain.norm()
        log |= _measure_inputs(x, together, objective.lengthscale)
    return g, Log(**log)


def _repel(particles: Tensor, objective: Objective) -> tuple[Repulsion, Tensor, Tensor]:
    """R of particles [M, B, D], their cotangents and how many rows are dead.

    A row with |J|^2 <= eps would get a gradient of order 1/sqrt(eps) from the normalisation.
    """
    method = objective.method
    result = repulsion(
        particles,
        objective.lengthscale,
        normalize=method.normalize,
        eps=objective.eps,
        bandwidth=method.bandwidth,
        backend=objective.backend,
    )
    cotangents = result.gradient
    if objective.repulsion_weight != 1:
        cotangents = cotangents * objective.repulsion_weight
    dead = particles.square().sum(-1, keepdim=True) <= objective.eps
    return result, cotangents.masked_fill(dead, 0) if method.normalize else cotangents, dead.sum()


def _diagnose(particles: Tensor, result: Repulsion, dead: Tensor, method: Method) -> dict[str, Tensor]:
    members = len(particles)
    first = getattr(method.bandwidth, "owner", "second") == "first"
    unit = F.normalize(particles, dim=-1)
    aligned = unit.sum(0).square().sum() - unit.square().sum()
    h = result.bandwidth[:, None] if first else result.bandwidth
    weights = kernel_weights(result.distances, h)
    return {
        "repulsion": result.value,
        "bandwidth_median": median(result.distances, (0,)).mean(),
        "gradient_cosine": aligned / (members * (members - 1) * particles.shape[1]),
        "weight_entropy": torch.special.entr(weights).sum() / members,
        "kernel_mean": ((-result.distances / h).exp().mean(2).sum() - members) / (members * (members - 1)),
        "dead_rows": dead,
    }


def _measure_inputs(x: Tensor, particles: Tensor, lengthscale) -> dict[str, Tensor]:
    """Whether the input gradients, particles [M, B, D], and the lengthscale fit the inputs x [B, ...]."""
    rows, found = x.detach().flatten(1), {}
    if particles.shape[1:] == rows.shape:
        found["input_alignment"] = F.cosine_similarity(particles, rows, dim=-1).abs().mean()
    variance = getattr(lengthscale, "variance", None)
    if variance and len(rows) > 1:
        found["input_variance"] = rows.var(0).sum() / variance
    return found


def published_schedule(progress: float, ratio: float = 0.01) -> float:
    """The learning rate's factor after a share `progress` of the epochs: 1 up to half, linear to `ratio` at 90 %."""
    return 1.0 if progress <= 0.5 else max(ratio, 1 - (1 - ratio) * (progress - 0.5) / 0.4)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(random: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(random[0].cpu())
    if len(random) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(random[1].cpu(), device)


class Position(NamedTuple):
    """How far a `fit` has come: epochs done, batches of the next one done, and the loader's own epoch in it."""

    epoch: int = 0
    batch: int = 0
    loader_epoch: int | None = None


class Trainer:
    """Trains an ensemble in place. The defaults are those of the published runs.

    method            "de", "forde", or a Method
    lengthscale       of the particles' space; None: the identity
    repulsion_weight  w. R carries 1/B where a posterior of N points has 1/N: w B / N is the power of the
                      posterior's repulsion; keep w / B fixed when the batch changes
    eps               added to the squared norm of a particle
    backend           of the repulsion operation
    lr, momentum, nesterov, weight_decay   of SGD
    optimizer         any torch optimiser in place of SGD: a callable that takes the members' parameters, such as
                      lambda parameters: torch.optim.Adam(parameters, lr=1e-3); lr, momentum, nesterov and
                      weight_decay are then its own, and a schedule multiplies its learning rates
    loss              (outputs, y) -> [], mean over the batch
    seed              of what is random in `fit` (dropout); the loader has its own
    accelerate        swap in layers with a fast second-order pass (see `forde_fast.accelerate`, whose report is
                      `acceleration`); False: leave the ensemble's layers as they are
    """

    def __init__(self, ensemble: Ensemble, method: str | Method = "forde", lengthscale=None,
                 repulsion_weight: float = 1.0, eps: float = 1e-24, backend: str = "auto", lr: float = 0.1,
                 momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 5e-4,
                 optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, seed: int = 0,
                 accelerate: bool = True):  # fmt: skip
        expect(isinstance(ensemble, Ensemble), "ensemble", "an Ensemble", type(ensemble).__name__, TypeError)
        for name, value in (
            ("repulsion_weight", repulsion_weight),
            ("momentum", momentum),
            ("weight_decay", weight_decay),
        ):
            validation.positive(value, name, allow_zero=True)
        validation.positive(eps, "eps")
        validation.positive(lr, "lr")
        check_backend(backend)
        fits = lengthscale is None or (hasattr(lengthscale, "coordinates") and hasattr(lengthscale, "product"))
        got = type(lengthscale).__name__
        expect(fits, "lengthscale", "None or a lengthscale such as Identity() or PCA.fit(images)", got, TypeError)
        expect(callable(loss), "loss", "a callable (outputs, y) -> []", loss, TypeError)
        given = optimizer is None or callable(optimizer)
        expect(given, "optimizer", "a callable that takes parameters", type(optimizer).__name__, TypeError)
        validation.whole(seed, "seed", least=0)
        self.ensemble = ensemble
        self.acceleration = second_order.accelerate(ensemble) if accelerate else second_order.Acceleration()
        self.objective = Objective(resolve(method), lengthscale, repulsion_weight, eps, backend, loss)
        self.sgd = SGD(lr, momentum, nesterov, weight_decay)
        self.velocity = torch.zeros_like(ensemble.flat)
        self.optimizer = None
        if optimizer is not None:
            parameters = [p for p in ensemble.parameters() if p.requires_grad]
            self.optimizer = optimizer(parameters)
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.seed = seed
        self.steps = self.epochs = 0  # done
        self.rows = 0  # members x samples of the last step
        self.position = Position()  # within the present call of `fit`
        self._random: list[Tensor] = []  # the generators' states at a `position` that was loaded
        self._classes: int | None = None
        self._shape: torch.Size | None = None  # of the samples that the members were tried on
        self._measured = torch.zeros(len(MEASURED), device=ensemble.flat.device)
        # of the present epoch's logs
        self._log_sum = torch.zeros(len(Log._fields), dtype=torch.float64, device=ensemble.flat.device)

    def step(self, x: Tensor, y: Tensor, rate: float = 1.0) -> Log:
        """One update on the batch x [B, ...], y [B], with the learning rate times `rate`."""
        self._check(x, y)
        if not self.ensemble.training:
            self.ensemble.train()
        flat, measured = self.ensemble.flat, self.steps % RATIO_EVERY == 0
        self.velocity = self.velocity.to(flat)  # the ensemble may have been moved or cast
        g, log = gradient(self.ensemble, flat, None, x, y, self.objective, measured)
        with torch.no_grad():
            if self.optimizer is None:
                descend_(flat, self.velocity, g, SGD(self.sgd.lr * rate, *self._sgd_rest))
            else:
                self._step_with_optimizer(g, rate)
        self.steps += 1
        self.rows = len(self.ensemble) * len(x)
        if measured:
            self._measured = torch.stack([getattr(log, name) for name in MEASURED])
        return log._replace(**dict(zip(MEASURED, self._measured, strict=True)))

    def fit(self, loader, epochs: int, schedule: Callable[[float], float] = published_schedule,
            on_step: Callable[[int, Log], None] | None = None,
            on_epoch: Callable[[int, Log], None] | None = None) -> None:  # fmt: skip
        """Train on the batches (x, y) of `loader`, an iterable that can be read once per epoch.

        schedule  (share of this call's epochs done before this one) -> factor on the learning rate
        on_step   called with (epoch, log) after every step
        on_epoch  called with (epoch, the mean of its logs) after every epoch

        After `load_state_dict` of a state taken in one of these two, the call continues the one that was
        interrupted: with the same loader, epochs and schedule it ends as that would have.
        """
        validation.whole(epochs, "epochs")
        random, self._random = self._random, []
        if not random:  # no state was loaded to go on from
            self.position = Position()
            self._log_sum.zero_()
        done = self.position.epoch
        expect(done <= epochs, "epochs", f"at least {done}, which are done", epochs)
        if self.position.loader_epoch is not None:
            loader.epoch = self.position.loader_epoch
        try:
            for epoch in range(done, epochs):
                self._fit_epoch(loader, epoch, schedule(epoch / epochs), on_step, random)
                batches = self.position.batch
                expect(batches > 0, "loader", "at least one batch per epoch", f"none in epoch {epoch}")
                log = Log(*self._log_sum / batches)
                self._log_sum.zero_()
                self.epochs += 1
                self.position = Position(epoch + 1, 0, getattr(loader, "epoch", None))
                if on_epoch is not None:
                    on_epoch(epoch, log)
        finally:
            self.position = Position()

    def _fit_epoch(self, loader, epoch: int, rate: float, on_step, random: list[Tensor]) -> None:
        device, loader_epoch = self.ensemble.flat.device, getattr(loader, "epoch", None)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, self.epochs]).generate_state(1)[0]))
            batches = iter(loader)
            if self.position.batch:  # go on within the epoch: what is done is read again, for the order's sake
                for _ in itertools.islice(batches, self.position.batch):
                    pass
                _set_random_state(random, device)
            for x, y in batches:
                log = self.step(x.to(device), y.to(device), rate)
                self._log_sum += torch.stack(log)
                self.position = Position(epoch, self.position.batch + 1, loader_epoch)
                if on_step is not None:
                    on_step(epoch, log)

    def state_dict(self) -> dict:
        """All that the rest of the training hangs on: tensors (not copied), numbers, and dicts and lists of them.

        The ensemble's parameters and buffers, velocity or torch's optimiser, steps and epochs, the place in the
        present `fit` and torch's generators (not Python's and NumPy's).
        """
        return {
            "ensemble": dict(self.ensemble.state_dict()),
            "velocity": self.velocity,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "steps": self.steps,
            "epochs": self.epochs,
            "position": list(self.position),
            "seed": self.seed,
            "log_sum": self._log_sum,
            "measured": self._measured,
            "random": _random_state(self.ensemble.flat.device),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from where `state` was taken, of a trainer with the same ensemble, method and optimiser.

        Raises ValueError, with nothing changed, for another ensemble or another kind of optimiser.
        """
        self.ensemble.check_state(state["ensemble"])
        kinds = ["torch's" if own else "this trainer's SGD" for own in (self.optimizer, state["optimizer"])]
        expect(kinds[0] == kinds[1], "optimizer", f"{kinds[1]}, as in the state", kinds[0])
        self.ensemble.load_state_dict(state["ensemble"])
        self.velocity = self.velocity.to(self.ensemble.flat)
        self.velocity.copy_(state["velocity"])
        if self.optimizer is not None:
            numbered = {int(index): own for index, own in state["optimizer"]["state"].items()}  # JSON's keys are text
            self.optimizer.load_state_dict({**state["optimizer"], "state": numbered})
        self.steps, self.epochs, self.seed = state["steps"], state["epochs"], state["seed"]
        self.position, self._random = Position(*state["position"]), state["random"]
        self._measured = state["measured"].to(self._measured.device, copy=True)
        self._log_sum = state["log_sum"].to(self._log_sum, copy=True)

    @property
    def _sgd_rest(self):
        return self.sgd.momentum, self.sgd.nesterov, self.sgd.weight_decay

    def _step_with_optimizer(self, g: Tensor, rate: float) -> None:
        parameters = [[p for p in member.parameters() if p.requires_grad] for member in self.ensemble.members]
        for row, own in zip(g, parameters, strict=True):
            for p, view in zip(own, row.split([p.numel() for p in own]), strict=True):
                p.grad = view.view(p.shape)
        for group, lr in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _check(self, x: Tensor, y: Tensor) -> None:
        flat = self.ensemble.flat
        expect(isinstance(x, Tensor), "x", "a torch.Tensor", type(x).__name__, TypeError)
        validation.tensor_of_floats(x, "x", ", ".join(["B"] + ["..."] * max(x.ndim - 1, 1)))
        expect(x.dtype == flat.dtype, "x", f"dtype {flat.dtype}, as the members", x.dtype, TypeError)
        expect(x.device == flat.device, "x", f"device {flat.device}, as the members", x.device)
        expect(isinstance(y, Tensor), "y", "a torch.Tensor", type(y).__name__, TypeError)
        expect(y.shape[:1] == x.shape[:1], "y", f"{len(x)} of them, one per sample", list(y.shape))
        expect(y.device == x.device, "y", f"device {x.device}, as x", y.device)
        space, size = self.objective.method.space, math.prod(x.shape[1:])
        by_input = isinstance(space, InputGradients)
        dimension = getattr(self.objective.lengthscale, "dimension", None) if by_input else None
        expect(dimension in (None, size), "x", f"{dimension} values per sample, as the lengthscale", size)
        if self._shape != x.shape[1:]:
            with torch.no_grad(), evaluation_mode(self.ensemble):
                self._classes = self.ensemble.member(0)(x).shape[-1]
            self._shape = x.shape[1:]
        elif x.is_cuda:
            return  # values are looked at once: each look would wait for the device
        validation.finite(x, "x")
        soft = y.is_floating_point() and y.ndim > 1
        indexed = by_input and not callable(space.score)
        if indexed or (self.objective.loss is F.cross_entropy and not soft):
            validation.labels_in_range(y, self._classes, "y")
            expect(y.dtype == torch.int64, "y", "dtype torch.int64", y.dtype, TypeError)
