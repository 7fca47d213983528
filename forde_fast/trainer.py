"""Trainer: the loop around the step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from forde_fast import graph, guards, heap, memory, second_order, validation
from forde_fast.batches import Check, read
from forde_fast.checkpoint import FOREIGN, check_trained
from forde_fast.choice import choose
from forde_fast.ensemble import Ensemble, split_row
from forde_fast.methods import Method, resolve
from forde_fast.step import (
    ALONE,
    MEASURED,
    RATIO_EVERY,
    SGD,
    Alone,
    Log,
    Objective,
    State,
    descend_,
    gradient,
    init,
    update,
)
from forde_fast.strategies import KINDS, Strategy, random_state, set_random_state
from forde_fast.validation import expect, reason_of

__all__ = ["MEASURED", "RATIO_EVERY", "SGD", "Log", "Objective", "State", "Trainer", "gradient", "init",
           "published_schedule", "update"]  # fmt: skip


def published_schedule(progress: float, ratio: float = 0.01) -> float:
    """The learning rate's factor after a share `progress` of the epochs: 1 up to half, linear to `ratio` at 90 %."""
    return 1.0 if progress <= 0.5 else max(ratio, 1 - (1 - ratio) * (progress - 0.5) / 0.4)


class Position(NamedTuple):
    """How far a `fit` has come: epochs done, batches of the next one done, and the loader's own epoch in it."""

    epoch: int = 0
    batch: int = 0
    loader_epoch: int | None = None


def _made(optimizer: Callable, ensemble: Ensemble) -> torch.optim.Optimizer:
    """What the callable makes of the members' parameters."""
    made = optimizer([p for p in ensemble.parameters() if p.requires_grad])
    usable = isinstance(made, torch.optim.Optimizer) and not isinstance(made, torch.optim.LBFGS)
    expected = "a callable that makes a torch.optim.Optimizer whose step needs no closure"
    expect(usable, "optimizer", expected, type(made).__name__, TypeError)
    return made


class Trainer:
    """Trains an ensemble in place. The defaults are those of the published runs.

    method            the name of one of `methods.METHODS` ("de", "forde", "weight-rde", ...), or a Method
    lengthscale       of the particles' space; None: the method's own, which is the identity if it has none
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
                      `acceleration`) where anything repels, on a GPU, or where "auto" finds them faster; False:
                      leave the ensemble's layers
    strategy          how the members are computed: "loop", "stacked" or "streams" (see `Strategy`), or "auto", which
                      tries a few steps of each at the first batch and takes the fastest; it is a loop for larger
                      members without repulsion and where members draw random numbers. They differ in rounding, so
                      that "auto" may give other last bits on another day. After the first step `strategy` is what is
                      used, `strategy_report` says why
    members_at_a_time, precision   of `Strategy`: less memory; "tf32" or "bf16" products
    memory_budget     bytes that a step may take for its tensors (what libraries take for themselves comes on top)
                      beyond the parameters, the velocity and what else there is before it: the first batch tells how
                      many members at a time that allows. The first step raises ValueError if it allows none.
                      On a CPU with glibc, what steps free is kept for the next ones, and given back when `fit` ends
                      (forde_fast.heap)
    channels_last     images in that memory layout. None: on CUDA in tf32 or bf16, where every member's attribute
                      `channels_last` says that it works so, as this package's networks do
    cuda_graph        on CUDA, record each kind of step once and launch it as a whole from then on, with the same
                      result; None: where there is CUDA. What members and the loss do in Python (hooks, counters,
                      Python's random numbers) is then done only while it is recorded: False where that matters.
                      Steps that cannot be recorded, because something waits for the device or with a torch
                      optimiser or members_at_a_time, are computed as usual; `strategy_report` says why
    repulsion_every   k: the repulsion acts at every k-th step only, with k times its weight. The log keeps what it
                      last saw of it
    repulsion_samples  n: the repulsion is that of the batch's first n samples, in a forward pass of their own: a
                      BatchNorm in training mode sees the statistics of n samples there (running statistics are
                      updated by the whole batch alone). A step is then a deep ensemble's on B samples and, in
                      passes over the network, an exact one on n: saves nothing from n = B / 2 on. Measured on a
                      CPU, n = B / 4 saves a tenth of an exact step's time for a resnet18 and nothing for a small
                      perceptron (docs/cheaper_repulsion.md): repulsion_every saves more. n >= B is exact
    mesh              a `distributed.Mesh`: `ensemble` is then this rank's part of the members, and every rank is
                      given the same whole batches, of which it computes its part
    """

    def __init__(self, ensemble: Ensemble, method: str | Method = "forde", lengthscale=None,
                 repulsion_weight: float = 1.0, eps: float = 1e-24, backend: str = "auto", lr: float = 0.1,
                 momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 5e-4,
                 optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, seed: int = 0,
                 accelerate: bool = True, strategy: str = "loop", members_at_a_time: int | None = None,
                 precision: str = "full", repulsion_every: int = 1, repulsion_samples: int | None = None,
                 channels_last: bool | None = None, cuda_graph: bool | None = None, mesh: Alone = ALONE,
                 memory_budget: int | None = None):  # fmt: skip
        expect(isinstance(ensemble, Ensemble), "ensemble", "an Ensemble", type(ensemble).__name__, TypeError)
        ensemble.check_built()
        method = resolve(method)
        lengthscale = method.lengthscale if lengthscale is None else lengthscale
        self.objective = Objective(method, lengthscale, repulsion_weight, eps, backend, loss,
                                   repulsion_every, repulsion_samples)  # fmt: skip
        self.sgd = SGD(lr, momentum, nesterov, weight_decay)
        getattr(method.space, "check", lambda ensemble: None)(ensemble)
        expect(isinstance(mesh, Alone), "mesh", "a distributed.Mesh", type(mesh).__name__, TypeError)
        given = optimizer is None or callable(optimizer)
        expect(given, "optimizer", "a callable that takes parameters", type(optimizer).__name__, TypeError)
        validation.whole(seed, "seed", least=0)
        validation.truth(accelerate, "accelerate")
        validation.one_of(strategy, "strategy", ("auto", *KINDS))
        for name, choice in (("channels_last", channels_last), ("cuda_graph", cuda_graph)):
            known = choice is None or isinstance(choice, bool)
            expect(known, name, "None, True or False", repr(choice), TypeError)
        if memory_budget is not None:
            validation.whole(memory_budget, "memory_budget")
            expect(members_at_a_time is None, "memory_budget", "None beside members_at_a_time", memory_budget)
            expect(mesh is ALONE, "memory_budget", "None with a mesh, whose ranks go in step", memory_budget)
        self.strategy, self.strategy_report = strategy, ""
        self._channels_last, self._cuda_graph, self._memory_budget = channels_last, cuda_graph, memory_budget
        self._recorder = None
        self._strategy = Strategy("loop", members_at_a_time, precision)  # `strategy` goes into it at the first step
        self.ensemble, self.mesh = ensemble, mesh
        self.members = mesh.members(ensemble)  # M; the ensemble has those of this rank
        self.optimizer = None if optimizer is None else _made(optimizer, ensemble)
        # where nothing repels there is no second-order pass, and training on a CPU stays plain PyTorch's to the byte
        # unless strategy="auto" finds other layers faster; on a GPU the layers pay in the first order too
        self._may_accelerate = accelerate
        self._accelerate = accelerate and (self.objective.repels(self.members) or ensemble.flat.is_cuda)
        self.acceleration = second_order.accelerate(ensemble) if self._accelerate else second_order.Acceleration()
        mesh.prepare(ensemble, strategy)
        self.velocity = torch.zeros_like(ensemble.flat)
        self.seed = seed
        self.steps = self.epochs = 0  # done
        self.rows = 0  # members x samples of the last step
        self.position = Position()  # within the present call of `fit`
        self._random: list[Tensor] = []  # the generators' states at a `position` that was loaded
        self._check = Check(ensemble)
        self._seen = Log(*torch.zeros(len(Log._fields), device=ensemble.flat.device))
        self._log_sum = self._seen.cross_entropy.new_zeros(len(Log._fields), dtype=torch.float64)  # this epoch's

    def step(self, x: Tensor, y: Tensor, rate: float = 1.0) -> Log:
        """One update on the batch x [B, ...], y [B], with the learning rate times `rate`."""
        validation.positive(rate, "rate", allow_zero=True)
        if self.steps % RATIO_EVERY == 0:  # to look takes milliseconds for many members
            self.ensemble.check_built()
        self._check(x, y, self.objective)
        x, y = (t.clone() if t.is_inference() else t for t in (x, y))  # of which autograd keeps nothing
        if not self.ensemble.training:
            self.ensemble.train()
        if not self.strategy_report:
            self._choose(x, y)
        self.velocity = self.velocity.to(self.ensemble.flat)  # the ensemble may have been moved or cast
        objective, measured = self.objective.at(self.steps), self.objective.measures(self.steps)
        if self._recorder is None:
            log = self._update(x, y, rate, objective, measured)
        else:
            log = self._launch(x, y, rate, objective, measured)
        if self.steps % self.objective.repulsion_every:
            log = Log(log.cross_entropy, *self._seen[1:])
        elif not measured:
            log = log._replace(**{name: getattr(self._seen, name) for name in MEASURED})
        self.steps, self._seen = self.steps + 1, log
        self.rows = self.members * len(x)
        return log

    def _choose(self, x: Tensor, y: Tensor) -> None:
        """How steps are computed from now on."""
        if not x.is_cuda:
            heap.keep()
        last = self._channels_last
        if last is None:
            able = all(getattr(member, "channels_last", False) for member in self.ensemble.members)
            last = x.is_cuda and able and self._strategy.precision != "full"
        strategy = replace(self._strategy, channels_last=last)
        accelerate = self._may_accelerate if self.strategy == "auto" else self._accelerate
        choice = choose(self.strategy, strategy, self.ensemble, self.objective, x, y, accelerate)
        self._strategy, accelerate, self.strategy_report = choice
        self.strategy, self._accelerate = self._strategy.kind, bool(accelerate)
        self._strategy = memory.within(self._memory_budget, self._strategy, self.ensemble, self.objective, x, y)
        if self._memory_budget is not None:
            self.strategy_report += f"; {self._strategy.members_at_a_time} members at a time within the memory budget"
        self._recorder = None
        if x.is_cuda if self._cuda_graph is None else self._cuda_graph:
            reason = graph.why_not(x.device, self._strategy, self.optimizer)
            reason = reason if type(self.mesh) is Alone else "there are several processes"
            self._recorder = None if reason else graph.Recorder(self._update)
            self._modules = list(self.ensemble.modules())  # to walk through them takes longer than to launch
            self.strategy_report += f"; no CUDA graph: {reason}" if reason else "; CUDA graph"

    def _update(self, x: Tensor, y: Tensor, rate: float | Tensor, objective: Objective, measured: bool) -> Log:
        """What a step does on the device, without waiting for it."""
        flat = self.ensemble.flat
        given = self.ensemble, flat, None, x, y, objective, measured, self._strategy, self.mesh
        if flat.is_cuda:  # to look would be to wait: the run looks now and then
            g, log = gradient(*given)
        else:
            g, log = self._guarded(given, x, y)
        with torch.no_grad():
            if self.optimizer is None:
                descend_(flat, self.velocity, g, self.sgd, rate)
            else:
                self._step_with_optimizer(g, rate)
        return log

    def _guarded(self, given, x: Tensor, y: Tensor) -> tuple[Tensor, Log]:
        """The step's gradient and log, or a ValueError with the step, member and layer where numbers are not finite.
        The parameters are then as they were."""
        first, own = self.mesh.own.start or 0, self.mesh.part(len(x))
        try:
            g, log = gradient(*given)
        except ValueError as error:
            loss = self.objective.loss
            raise guards.located(self.ensemble, x[own], y[own], loss, error, self.steps, first) from None
        guards.check_step(self.ensemble, g, log, self.steps, first)
        return g, log

    def _launch(self, x: Tensor, y: Tensor, rate: float, objective: Objective, measured: bool) -> Log:
        """`_update`, as a CUDA graph where it is recorded."""
        measured = measured and objective.repels(self.members)
        modes = tuple(module.training for module in self._modules)
        kind = measured, objective.repulsion_weight, modes
        constants = self.objective, self.sgd, self._strategy, self.ensemble.flat, self.velocity
        log = self._recorder(x, y, rate, (objective, measured), kind, constants)
        if self._recorder.reason:
            self.strategy_report = self.strategy_report.replace("; CUDA graph", "; no CUDA graph: ")
            self.strategy_report += self._recorder.reason
            self._recorder = None
        return log

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
        iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
        expect(iterable, "loader", "an iterable of batches", type(loader).__name__, TypeError)
        expect(callable(schedule), "schedule", "a callable (progress) -> factor", schedule, TypeError)
        random, self._random = self._random, []
        if not random:  # no state was loaded to go on from
            self.position = Position()
            self._log_sum.zero_()
        self.ensemble.check_built()
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
            heap.trim()

    def _fit_epoch(self, loader, epoch: int, rate: float, on_step, random: list[Tensor]) -> None:
        device, loader_epoch = self.ensemble.flat.device, getattr(loader, "epoch", None)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._mixed_seed())
            batches = iter(loader)
            if self.position.batch:  # go on within the epoch: what is done is read again, for the order's sake
                for _ in itertools.islice(batches, self.position.batch):
                    pass
                set_random_state(random, device)
            for x, y in read(batches, epoch, self.position.batch):
                log = self.step(x.to(device), y.to(device), rate)
                self._log_sum += torch.stack(log)
                self.position = Position(epoch, self.position.batch + 1, loader_epoch)
                if on_step is not None:
                    on_step(epoch, log)

    def _mixed_seed(self, *more: int) -> int:
        """Of what is random from here on: ranks with other samples or members draw other numbers."""
        numbers = [self.seed, self.epochs, *more, *([self.mesh.rank] if self.mesh.rank else [])]
        return int(np.random.SeedSequence(numbers).generate_state(1)[0])

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
            "seen": torch.stack(self._seen),
            "strategy": self.strategy,
            "accelerate": self._accelerate,
            "random": random_state(self.ensemble.flat.device),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from where `state` was taken, of a trainer with the same ensemble, method and optimiser.

        `state["random"]` may be None: masks are then drawn anew. Raises ValueError, with nothing changed, for another
        ensemble, another kind of optimiser, or what is no such state.
        """
        expect(isinstance(state, dict), "state", "a dict, of state_dict()", type(state).__name__, TypeError)
        ensemble = state.get("ensemble")
        self.ensemble.check_state(ensemble if isinstance(ensemble, dict) else {})
        check_trained(state, self.state_dict())
        kinds = ["torch's" if own else "this trainer's SGD" for own in (self.optimizer, state["optimizer"])]
        expect(kinds[0] == kinds[1], "optimizer", f"{kinds[1]}, as in the state", kinds[0])
        if self.optimizer is not None:
            try:
                numbered = {int(index): own for index, own in state["optimizer"]["state"].items()}  # JSON has texts
                self.optimizer.load_state_dict({**state["optimizer"], "state": numbered})
            except FOREIGN as error:
                raise ValueError(f"optimizer: expected a state of it, got another ({reason_of(error)})") from None
        self.ensemble.load_state_dict(state["ensemble"])
        self.velocity = self.velocity.to(self.ensemble.flat)
        self.velocity.copy_(state["velocity"])
        self.steps, self.epochs, self.seed = state["steps"], state["epochs"], state["seed"]
        self.position, self._random = Position(*state["position"]), state["random"] or self._drawn_anew()
        self._seen = Log(*state["seen"].to(self.ensemble.flat.device, copy=True))
        self.strategy, self.strategy_report = state["strategy"], ""  # how the interrupted run was computed
        if self._may_accelerate and self._accelerate != state["accelerate"]:
            (second_order.accelerate if state["accelerate"] else second_order.decelerate)(self.ensemble)
            self._accelerate = state["accelerate"]
        self._log_sum = state["log_sum"].to(self._log_sum, copy=True)

    def _drawn_anew(self) -> list[Tensor]:
        """Generators' states for a training that was split among other ranks before."""
        device = self.ensemble.flat.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._mixed_seed(self.steps))
            return random_state(device)

    def _step_with_optimizer(self, g: Tensor, rate: float) -> None:
        for row, member in zip(g, self.ensemble.members, strict=True):
            for p, view in split_row(row, member):
                p.grad = view
        groups = self.optimizer.param_groups
        own = [group["lr"] for group in groups]  # which is the optimiser's, or that of a scheduler of its own
        for group, lr in zip(groups, own, strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        for group, lr in zip(groups, own, strict=True):
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
